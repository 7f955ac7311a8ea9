"""One file from the network to this disk: resumed, verified, and visible only when it is whole.

The client libraries of hubs restart a killed download from its first byte and give up at the first
status 500 of a file; this does neither.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from dtt import storage
from dtt.data.remote.partial import Partial, RemoteFile, shown
from dtt.data.remote.retries import (
    Note,
    Pause,
    Retries,
    StoppedError,
    TemporaryError,
    is_temporary,
    note,
    pause_until,
    retry_after,
)
from dtt.errors import DataError
from dtt.version import __version__

BLOCK = 256 << 10
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as dead."""
PRIVATE = {"authorization", "cookie", "proxy-authorization"}
"""Headers that only the host they were meant for may see."""
OFFLINE = ("1", "true", "yes", "on")


def is_offline(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment forbids to use the network (HF_HUB_OFFLINE)."""
    return environ.get("HF_HUB_OFFLINE", "").lower() in OFFLINE


class Fetcher:
    """Downloads files one at a time; several threads may share one.

    `headers` are sent to the host of a file's URL and to no other. `refused(status, url)` may give
    the line for a request that is denied or finds nothing. Set `stop` to end all downloads.
    `begun` is when its first file did (None: none has), and `brought` how many bytes came since.
    """

    def __init__(
        self,
        headers: Mapping[str, str] | None = None,
        *,
        refused: Callable[[int, str], DataError | None] = lambda status, url: None,
        timeout: float = TIMEOUT,
        pause: Pause | None = None,
        note: Note = note,
    ) -> None:
        self.headers = {"User-Agent": f"dtt/{__version__}", "Accept-Encoding": "identity"}
        self.headers |= dict(headers or {})
        self.refused, self.timeout, self.note = refused, timeout, note
        self.stop = threading.Event()
        self.pause = pause or pause_until(self.stop)
        self.begun: float | None = None
        self.brought = 0
        self._counting = threading.Lock()
        self._opener = _opener()

    def size(self, url: str) -> int | None:
        """Ask for the size of a file without getting it; None where the server does not say.
        DataError: the file is refused or missing."""
        retries, method = Retries(shown(url), self.pause, self.note), "HEAD"
        while True:
            try:
                with self._open(url, {}, method) as response:
                    return _number(response.headers.get("Content-Length"))
            except TemporaryError as problem:
                retries.wait(problem)
            except DataError:
                if method == "GET":
                    raise
                method = "GET"  # some servers know no HEAD; the answer's body is not read

    def fetch(self, file: RemoteFile, advance: Callable[[int], None] = lambda count: None) -> None:
        """Bring `file` here, unless it is. `advance` gets bytes as they come, negative ones when
        some were in vain. DataError: it is refused, missing, another file, or TRIES attempts in a
        row brought nothing; what has arrived stays for the next time."""
        if file.record() is not None:
            return
        self.begun = self.begun or time.perf_counter()
        storage.make_folder(file.path.parent)
        retries = Retries(shown(file.url), self.pause, self.note)
        with Partial(file, advance) as part:
            furthest, damaged = part.size, False
            while True:
                try:
                    if not part.is_whole():
                        self._attempt(part)
                    problem = part.mismatch()
                    if problem is None:
                        part.finish()
                        return
                    part.clear()
                    if damaged:
                        raise DataError(
                            f"{shown(file.url)}: {problem}",
                            "the server has another file: check the address and the hash",
                        )
                    damaged = True
                    raise TemporaryError(problem)
                except TemporaryError as failure:
                    if part.size > furthest:
                        furthest = part.size
                        retries.progress()
                    retries.wait(failure)

    def _attempt(self, part: Partial) -> None:
        """One request for what is missing; what arrives before a failure is kept."""
        headers: dict[str, str] = {}
        if part.size:
            headers["Range"] = f"bytes={part.size}-"
            if part.record.validator and not part.has_digest:
                headers["If-Range"] = part.record.validator
        with self._open(part.file.url, headers, "GET", part) as response:
            total = _number(response.headers.get("Content-Length"))
            if response.status == 206:
                start, total = _content_range(response.headers.get("Content-Range"))
                if start != part.size or part.record.size not in (None, total):
                    part.clear()
                    raise TemporaryError("the file changed while it was downloaded")
            elif response.status != 200:
                raise DataError(f"{shown(part.file.url)}: HTTP status {response.status}")
            else:
                part.clear()
            part.begin(response.headers, total)
            self._copy(response, part)
        if part.size < (total or 0):
            raise TemporaryError(f"the connection ended after {part.size:,} of {total:,} bytes")

    def _copy(self, response: Any, part: Partial) -> None:
        while True:
            if self.stop.is_set():
                raise StoppedError
            try:
                # What one system call has: a larger read would lose what came before a reset.
                block = response.read1(BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise TemporaryError(_reason(error)) from None
            if not block:
                return
            part.append(block)
            with self._counting:
                self.brought += len(block)

    def _open(
        self, url: str, headers: dict[str, str], method: str, part: Partial | None = None
    ) -> Any:
        request = urllib.request.Request(url, headers=self.headers | headers, method=method)
        try:
            return self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if is_temporary(error.code):
                after = retry_after(error.headers.get("Retry-After"))
                raise TemporaryError(f"HTTP status {error.code}", after) from None
            if error.code == 416 and part is not None:
                part.clear()
                raise TemporaryError("the file is shorter than what is here of it") from None
            raise self._refusal(error.code, url) from None
        except ssl.SSLCertVerificationError as error:
            raise DataError(f"{shown(url)}: {error.verify_message}", _CERTIFICATES) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                message = error.reason.verify_message
                raise DataError(f"{shown(url)}: {message}", _CERTIFICATES) from None
            raise TemporaryError(_reason(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise TemporaryError(_reason(error)) from None

    def _refusal(self, status: int, url: str) -> DataError:
        explained = self.refused(status, url)
        if explained is not None:
            return explained
        if 300 <= status < 400:
            return DataError(f"{shown(url)}: it redirects to where dtt does not follow")
        meaning = http.client.responses.get(status, "").lower()
        return DataError(f"{shown(url)}: HTTP status {status} {meaning}", "check the address")


_CERTIFICATES = "the server's certificate is not trusted here; set SSL_CERT_FILE if it should be"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a GET to http(s), never from https to http, and takes no secret to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
            return None  # urllib then reports the redirect itself as the answer
        same = (old.scheme, old.netloc) == (new.scheme, new.netloc)
        kept = {k: v for k, v in req.header_items() if same or k.lower() not in PRIVATE}
        kept.pop("Host", None)
        return urllib.request.Request(newurl, headers=kept, method=req.get_method())

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # not in Python 3.10


def _opener() -> urllib.request.OpenerDirector:
    """What opens http and https, and no other address, proxies of the environment included."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _Redirects,
    ):
        opener.add_handler(handler())
    return opener


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _content_range(text: str | None) -> tuple[int, int | None]:
    """First byte and size of the whole of "bytes 5-9/10"; -1: it is not that."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text or "")
    return (int(match[1]), _number(match[2])) if match else (-1, None)


def _reason(error: BaseException | str) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended too early"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200].lower()
