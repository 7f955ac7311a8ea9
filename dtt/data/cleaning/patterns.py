"""Regular expressions over documents, and the masking of e-mail and IP addresses."""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Iterator

from dtt.config.cleaning import Pii, RegexDrop, RegexReplace
from dtt.data.cleaning.step import Dropped

# Bounded, and begun only where no such character stands before: linear in the text even where it
# is one word of ten million letters. The part before the @ has at most 64 characters (RFC 5321).
EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{0,63}"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])"
)
LOCAL, DOMAIN = 64, 600
"""The most characters that an address has before its @, and from it on."""
IPV4 = re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\w|\.[0-9])")
IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]{1,35}[0-9A-Fa-f:](?![\w:])")
# What every address has inside; found first, for it begins with one certain character.
IN_IPV4 = re.compile(r"\.[0-9]{1,3}\.")
IN_IPV6 = re.compile(r":[0-9A-Fa-f]{0,4}:")


class DropMatches:
    """Leaves out documents in which an expression occurs often enough."""

    def __init__(self, settings: RegexDrop) -> None:
        self.matches = settings.matches
        self.pattern = re.compile(settings.pattern)

    def __call__(self, text: str) -> str | Dropped:
        found = sum(1 for _ in itertools.islice(self.pattern.finditer(text), self.matches))
        return Dropped("the pattern occurs") if found == self.matches else text


class ReplaceMatches:
    """Puts a text in the place of each match."""

    def __init__(self, settings: RegexReplace) -> None:
        self.replacement = settings.replacement
        self.pattern = re.compile(settings.pattern)

    def __call__(self, text: str) -> str:
        return self.pattern.sub(self.replacement, text)


class MaskAddresses:
    """Puts placeholders for e-mail and IP addresses; applying it twice changes nothing more.

    What it cannot see: addresses written out ("me at example dot com"), and names, telephone
    numbers and other personal data.
    """

    def __init__(self, settings: Pii) -> None:
        self.settings = settings

    def __call__(self, text: str) -> str:
        email, ip = self.settings.email, self.settings.ip
        if email is not None:
            text = "".join(_with_emails_as(email, text))
        if ip is not None:
            if IN_IPV4.search(text):
                text = IPV4.sub(self._masked, text)
            if IN_IPV6.search(text):
                text = IPV6.sub(self._masked, text)
        return text

    def _masked(self, match: re.Match[str]) -> str:
        found = match[0]
        try:
            address = ipaddress.ip_address(found)
        except ValueError:
            return found
        if self.settings.public_only and not _is_public(address):
            return found
        if not any(character.isdigit() for character in found):
            return found  # "dead::beef" is a valid address, and more often a name in a program
        assert self.settings.ip is not None
        return self.settings.ip


def _with_emails_as(placeholder: str, text: str) -> Iterator[str]:
    """Yield `text` with EMAIL replaced; only what is around an @ is looked at."""
    done, place = 0, text.find("@")
    while place >= 0:
        match = EMAIL.search(text, max(done, place - LOCAL), place + DOMAIN)
        if match:
            yield text[done : match.start()]
            yield placeholder
            done = match.end()
        place = text.find("@", max(done, place + 1))
    yield text[done:]


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether it names one machine in the world: of IPv6 only 2000::/3 is given out (RFC 4291)."""
    return address.is_global and (address.version == 4 or int(address) >> 125 == 1)
