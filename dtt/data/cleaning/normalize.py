"""One way to write the same text."""

from __future__ import annotations

import re
import unicodedata

from dtt.config.cleaning import Unicode

# CR LF, CR, NEL, LINE SEPARATOR, PARAGRAPH SEPARATOR; vertical tab and form feed are controls.
NEWLINES = re.compile("\r\n|[\r\x85\u2028\u2029]")
# C0 and C1 but tab, line feed and what NEWLINES has; DEL; byte-order marks; lone surrogates.
ASCII_CONTROL = bytes({*range(32), 127} - {*b"\t\n\r"})
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ud800-\udfff]")


class UnicodeForm:
    """Writes a text in a Unicode normalisation form, with line feeds and without controls.

    Applying it twice changes nothing more.
    """

    def __init__(self, settings: Unicode) -> None:
        self.settings = settings

    def __call__(self, text: str) -> str:
        settings = self.settings
        if settings.newlines and ("\r" in text or not text.isascii()):
            text = NEWLINES.sub("\n", text)
        if text.isascii():  # is in every form, and its control characters are found faster
            if settings.control:
                text = text.encode().translate(None, ASCII_CONTROL).decode()
            return text
        if settings.control:
            text = CONTROL.sub("", text)
        form = settings.form
        if form is None or unicodedata.is_normalized(form, text):
            return text
        return unicodedata.normalize(form, text)
