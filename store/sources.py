"""The places that callers may name as the source of an adapter, and how they are read.

The operator lists places; below those a caller may name a folder of this machine, or one that
fsspec reads. Who names a source must not reach anything else by it: not by `..`, not by a link
that is put in the way at the right moment, not by a redirect.

Reading blocks on disk and network; call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from store.artifacts import COPY_CHUNK_BYTES, MAX_WEIGHTS_BYTES, FolderFiles, SourceUnusable

if TYPE_CHECKING:
    from aiohttp import ClientResponse

CONNECT_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 60.0
MAX_TRANSFER_S = 3600.0
"""Of one file: 4 GiB in an hour are 1.2 MB/s. A server that trickles holds a thread."""

HTTP_PORTS = {"http": 80, "https": 443}
"""Protocols whose hosts have no case, and the ports that need not be said."""
NOT_REMOTE = frozenset(
    {
        *("asynclocal", "async_wrapper", "asyncwrapper", "blockcache", "cached", "dask", "data"),
        *("dir", "file", "filecache", "generic", "git", "libarchive", "local", "reference"),
        *("simplecache", "tar", "zip"),
    }
)
"""Protocols of fsspec that read this machine, or lead on to another place."""

_HOST = re.compile(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?")
_TRICKS = re.compile(r"[\x00-\x20\x7f\\]|%25|%(?![0-9A-Fa-f]{2})")
"""What parsers of URLs read differently, for example a percent sign that decodes twice."""
_TRICKS_DECODED = re.compile(r"[\x00-\x1f\x7f/\\]")


class SourceNotAllowed(Exception):
    """The place is not below one that the operator lists."""

    def __init__(self, uri: str) -> None:
        super().__init__(
            f"the gateway may not read {uri!r}; upload the adapter, or have the place added to "
            "--adapter-source-allow"
        )
        self.uri = uri


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder of this machine, below one that the operator allowed. A `Source`."""

    root: Path
    """As the operator wrote it; may be reached through links."""
    names: tuple[str, ...]
    """From the root to the folder; none of them may be a link."""

    @contextlib.contextmanager
    def open(self) -> Iterator[FolderFiles]:
        """Walk to the folder. Raises SourceUnusable if it is missing, or a link is on the way."""
        path = self.root.joinpath(*self.names)
        descriptor = _open_name(str(self.root), None, path)
        try:
            for name in self.names:
                parent, descriptor = descriptor, _open_name(name, descriptor, path)
                os.close(parent)
            yield FolderFiles(descriptor, path)
        finally:
            os.close(descriptor)


def _open_name(name: str, parent: int | None, path: Path) -> int:
    # O_PATH, because walking through a folder needs no permission to list it. A link that
    # replaces a name at any moment is not followed: each name is looked up in an open folder.
    flags = os.O_PATH | os.O_DIRECTORY | (os.O_NOFOLLOW if parent is not None else 0)
    try:
        return os.open(name, flags, dir_fd=parent)
    except FileNotFoundError as error:
        raise SourceUnusable(f"{path} does not exist; name the adapter's folder") from error
    except NotADirectoryError as error:
        raise SourceUnusable(
            f"{path} is no folder, or reached through a symbolic link ({name}), which is not "
            "followed; name the adapter's folder itself"
        ) from error
    except OSError as error:
        raise SourceUnusable(
            f"{path} cannot be opened ({error.strerror}); let the gateway read it"
        ) from error


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder that fsspec reads, below a URL that the operator allowed. A `Source`."""

    url: str
    """`protocol://host/path`, without user, query, fragment and final slash."""
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    """Of HTTP, as the next; other protocols keep their driver's."""
    idle_timeout_s: float = IDLE_TIMEOUT_S

    @contextlib.contextmanager
    def open(self) -> Iterator[RemoteFiles]:
        """Make the driver ready. Raises SourceUnusable if it is not installed."""
        import fsspec.asyn  # type: ignore[import-untyped]

        protocol = self.url.partition(":")[0]
        options = self._http_options() if protocol in HTTP_PORTS else {}
        try:
            # Not fsspec's cached one: it would keep sessions, listings and old credentials.
            driver = fsspec.filesystem(
                protocol, skip_instance_cache=True, use_listings_cache=False, **options
            )
        except Exception as error:  # whatever a driver can raise
            raise _unusable(self.url, error) from error
        try:
            yield RemoteFiles(driver, self.url, protocol in HTTP_PORTS)
        finally:
            if protocol in HTTP_PORTS:
                session = fsspec.asyn.sync(driver.loop, driver.set_session)
                driver.close_session(driver.loop, session)

    def _http_options(self) -> dict[str, Any]:
        import aiohttp

        timeout = aiohttp.ClientTimeout(
            total=None, connect=self.connect_timeout_s, sock_read=self.idle_timeout_s
        )
        return {
            "client_kwargs": {"timeout": timeout, "raise_for_status": _refuse_all_but_ok},
            "allow_redirects": False,
            "headers": {"Accept-Encoding": "identity"},
        }


@dataclass(frozen=True, slots=True)
class RemoteFiles:
    """The files of a remote folder, read from begin to end and never listed."""

    driver: Any
    """A file system of fsspec, which has no types."""
    url: str
    is_http: bool

    def chunks(self, name: str, limit_bytes: int) -> Iterator[bytes | memoryview]:
        """See `SourceFiles.chunks`. Counts what comes, whatever length was announced."""
        url = f"{self.url}/{name}"
        # A stream for HTTP. The size is not used, but saves a request that would ask for it.
        options = {"block_size": 0, "size": limit_bytes} if self.is_http else {}
        deadline_s = time.monotonic() + MAX_TRANSFER_S
        size_bytes = 0
        try:
            with self.driver.open(url, "rb", **options) as file:
                while chunk := file.read(COPY_CHUNK_BYTES):
                    size_bytes += len(chunk)
                    if size_bytes > limit_bytes:
                        raise _Refused(f"has more than {limit_bytes} bytes, which is the limit")
                    if time.monotonic() > deadline_s:
                        raise _Refused(f"took more than {MAX_TRANSFER_S:.0f} s; upload it")
                    yield chunk
        except Exception as error:  # whatever a driver can raise
            raise _unusable(url, error) from error


class _Refused(Exception):
    """What a server answers is not taken. The text goes on after the URL."""


async def _refuse_all_but_ok(response: ClientResponse) -> None:
    """Called by aiohttp for each answer, before anything of its body is read."""
    if response.status == 200 and (response.content_length or 0) <= MAX_WEIGHTS_BYTES:
        return
    response.close()
    match response.status:
        case 200:
            raise _Refused(f"has {response.content_length} bytes, the limit is {MAX_WEIGHTS_BYTES}")
        case 404 | 410:
            raise FileNotFoundError
        case 401 | 403:
            raise PermissionError
        case status if 300 <= status < 400:
            raise _Refused("is redirected, and redirects are not followed; name where it leads")
        case status:
            raise _Refused(f"was answered with HTTP status {status}; look at the server")


def _unusable(url: str, error: Exception) -> SourceUnusable:
    """In our own words: a driver's may hold credentials, for example in a signed URL."""
    match error:
        case _Refused():
            text = str(error)
        case ImportError():
            text = "needs a driver of fsspec that is not installed beside the gateway; upload it"
        case FileNotFoundError():
            text = "does not exist; name a folder that PEFT's save_pretrained wrote"
        case PermissionError():
            text = "may not be read with the gateway's credentials; let it, or upload the adapter"
        case TimeoutError():
            text = "was not answered in time; look at the server, or upload the adapter"
        case ssl.SSLError():
            text = "has no TLS certificate that the gateway trusts; look at the server"
        case OSError(errno=int(number)) if number > 0:
            text = f"cannot be reached ({os.strerror(number)}); check host and port"
        case _:
            text = f"could not be read to its end ({type(error).__name__}); try again"
    return SourceUnusable(f"{url} {text}")


class AllowedSources:
    """The places that the operator lists with `--adapter-source-allow`."""

    def __init__(
        self,
        prefixes: Sequence[str],
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        """Each of `prefixes` is an absolute path or a URL, and allows itself and all below.

        Raises ValueError for one that is neither.
        """
        self._folders: list[tuple[str, ...]] = []
        self._urls: list[_Url] = []
        for prefix in prefixes:
            try:
                place = _parse(prefix)
            except ValueError as error:
                raise ValueError(f"the allowed source {_show(prefix)} {error}") from None
            if isinstance(place, _Url):
                self._urls.append(place)
            else:
                self._folders.append(place)
        self._folders.sort(key=len, reverse=True)  # the deepest root follows most links
        self._timeouts_s = connect_timeout_s, idle_timeout_s

    def resolve(self, uri: str) -> LocalFolder | RemoteFolder:
        """The place that a caller names, if it is below an allowed one. Touches nothing.

        Raises SourceUnusable if it is no place at all, SourceNotAllowed if it is outside.
        """
        try:
            place = _parse(uri)
        except ValueError as error:
            raise SourceUnusable(f"the source {_show(uri)} {error}") from None
        if isinstance(place, _Url):
            if any(place.is_below(allowed) for allowed in self._urls):
                return RemoteFolder(str(place), *self._timeouts_s)
        else:
            for root in self._folders:
                if place[: len(root)] == root:
                    return LocalFolder(Path("/", *root), place[len(root) :])
        raise SourceNotAllowed(uri)


@dataclass(frozen=True, slots=True)
class _Url:
    """In the one spelling that is compared, and that is then asked for."""

    protocol: str
    host: str
    """With the port, unless it is the protocol's own."""
    names: tuple[str, ...]
    """Of its path, percent-encoded as they came: another encoding is another place."""

    def is_below(self, other: _Url) -> bool:
        return (self.protocol, self.host) == (other.protocol, other.host) and (
            self.names[: len(other.names)] == other.names
        )

    def __str__(self) -> str:
        return "/".join((f"{self.protocol}://{self.host}", *self.names))


def _parse(text: str) -> tuple[str, ...] | _Url:
    """The names of an absolute path, or a URL.

    Raises ValueError with a text that goes on after the place.
    """
    if text.startswith("/"):
        return _parse_path(text)
    if "::" in text:
        raise ValueError("is a chain of URLs; name one place")
    if _TRICKS.search(text):
        raise ValueError("holds characters that a URL must not; encode them, and none twice")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError("is no valid URL; correct its host and port") from None
    if not parts.scheme:
        raise ValueError(
            "is neither an absolute path nor a URL such as https://host/folder or s3://bucket/folder"
        )
    if "@" in parts.netloc or "?" in text or "#" in text:
        raise ValueError("holds a user, a query or a fragment; leave these out")
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return _parse_path(unquote(parts.path))
    return _Url(
        parts.scheme, _parse_host(parts.scheme, parts.netloc, port), _parse_names(parts.path)
    )


def _parse_path(path: str) -> tuple[str, ...]:
    names = tuple(name for name in path.split("/") if name not in ("", "."))
    if not path.startswith("/") or "\0" in path or ".." in names:
        raise ValueError("is no path that begins with / and has no '..'; write it out")
    if any(name.startswith("~") for name in names):
        raise ValueError("has a name that begins with '~', which is not expanded; write it out")
    return names


def _parse_host(protocol: str, netloc: str, port: int | None) -> str:
    import fsspec

    if protocol in NOT_REMOTE or protocol not in fsspec.available_protocols():
        raise ValueError(f"has the protocol {protocol!r}, which reads no remote place; use another")
    if not _HOST.fullmatch(netloc):
        raise ValueError("has no host or bucket of letters, digits, '.', '-' and '_'; name one")
    if protocol not in HTTP_PORTS:
        return netloc
    host = netloc.partition(":")[0].lower()
    return host if port in (None, HTTP_PORTS[protocol]) else f"{host}:{port}"


def _parse_names(path: str) -> tuple[str, ...]:
    path = path.removeprefix("/").removesuffix("/")
    names = tuple(path.split("/")) if path else ()
    for name in names:
        decoded = unquote(name)
        # Some servers cut a name at its semicolon before they look at it.
        if decoded.partition(";")[0] in ("", ".", "..") or _TRICKS_DECODED.search(decoded):
            raise ValueError("has an empty name, '.', '..' or an encoded slash in its path")
    return names


def _show(place: str) -> str:
    """For messages; not if it may hold a password or a signature."""
    return "(not shown, it may hold credentials)" if set(place) & set("@?#") else repr(place)
