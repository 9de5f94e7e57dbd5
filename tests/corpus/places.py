"""Sources that lead where the gateway may not read, each at a good adapter if at any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from store.artifacts import WEIGHTS_FILE
from tests.corpus.broken import Broken, Build, Kind, Offer, outside
from tests.corpus.draft import good_draft


def at(uri: str) -> Build:
    """A URI that needs no files."""
    return lambda folder, model: Offer(uri)


def beyond(uri: Callable[[Path, Path], str]) -> Build:
    """A good adapter outside, and a URI of it, made of the case's folder and the one outside."""

    def build(folder: Path, model: Path) -> Offer:
        there = outside(folder)
        good_draft(model).write(there)
        return Offer(uri(folder, there))

    return build


def within(uri: Callable[[Path], str]) -> Build:
    """A good adapter where the gateway may read, and a URI that is no name of it."""

    def build(folder: Path, model: Path) -> Offer:
        good_draft(model).write(folder)
        return Offer(uri(folder))

    return build


def sibling(folder: Path, model: Path) -> Offer:
    """A good adapter in a folder whose name begins as the allowed one's does."""
    there = folder.parent.with_name(f"{folder.parent.name}-other") / folder.name
    there.mkdir(parents=True)
    good_draft(model).write(there)
    return Offer(str(there))


def up(folder: Path, there: Path) -> str:
    return f"{folder}/../../{there.relative_to(folder.parent.parent)}"


def encoded_up(folder: Path, there: Path) -> str:
    return f"file://{folder}/%2e%2e/%2e%2e/{there.relative_to(folder.parent.parent)}"


FORBIDDEN = "the gateway may not read"
DOTS = r"is no path that begins with / and has no '\.\.'"
NO_PLACE = "is neither an absolute path nor a URL"
CHAIN = "is a chain of URLs; name one place"
PROTOCOL = "which reads no remote place"
TRICKS = "holds characters that a URL must not"
SECRETS = "holds a user, a query or a fragment"

NOT_ALLOWED: dict[str, Build] = {
    "place-outside": beyond(lambda folder, there: str(there)),
    "place-outside-by-url": beyond(lambda folder, there: f"file://{there}"),
    "place-beside-the-prefix": sibling,
    "place-root": at("/"),
    "place-etc": at("file:///etc"),
    "place-proc": at("/proc/self/cwd"),
    "place-http": at("http://127.0.0.1:9/adapters/sql"),
    "place-metadata-server": at("http://169.254.169.254/latest/meta-data"),
    "place-https": at("https://example.com/adapters/sql"),
    "place-s3": at("s3://bucket/sql"),
    "place-memory": at("memory://bucket/sql"),
}

NO_SOURCE: dict[str, tuple[Build, str]] = {
    "place-missing": (within(lambda folder: f"{folder}/gone"), "does not exist"),
    "place-is-file": (within(lambda folder: f"{folder}/{WEIGHTS_FILE}"), "is no folder"),
    "place-up": (beyond(up), DOTS),
    "place-up-encoded": (beyond(encoded_up), DOTS),
    "place-relative": (at("adapters/sql"), NO_PLACE),
    "place-dot": (at("."), NO_PLACE),
    "place-home": (at("~root/adapters"), NO_PLACE),
    "place-home-in-path": (at("/~root/adapters"), "a name that begins with '~'"),
    "place-nul": (within(lambda folder: f"{folder}\0/etc"), DOTS),
    "place-nul-in-url": (at("http://127.0.0.1/a\0b"), TRICKS),
    "place-newline": (at("http://127.0.0.1/a\nb"), TRICKS),
    "place-backslash": (at("http://127.0.0.1\\@evil/a"), TRICKS),
    "place-encoded-twice": (at("http://127.0.0.1/%252e%252e/a"), TRICKS),
    "place-chain": (at("simplecache::http://127.0.0.1/a"), CHAIN),
    "place-chain-zip": (at("zip://a::/etc/a.zip"), CHAIN),
    "place-data": (at("data:,x"), PROTOCOL),
    "place-other-host-file": (at("file://elsewhere/etc"), PROTOCOL),
    "place-local-protocol": (at("local:///etc"), PROTOCOL),
    "place-unknown-protocol": (at("gopher://127.0.0.1/a"), PROTOCOL),
    "place-with-user": (at("http://user:password@127.0.0.1/a"), SECRETS),
    "place-with-query": (at("http://127.0.0.1/a?b"), SECRETS),
    "place-without-host": (at("http:///a"), "has no host"),
    "place-with-bad-port": (at("http://127.0.0.1:port/a"), "is no valid URL"),
    "place-up-in-url": (at("http://127.0.0.1/a/%2e%2e/b"), "has an empty name"),
}

PLACES = (
    *(
        Broken(name, Kind.PLACE, build, FORBIDDEN, "SOURCE_NOT_ALLOWED")
        for name, build in NOT_ALLOWED.items()
    ),
    *(Broken(name, Kind.PLACE, build, expected) for name, (build, expected) in NO_SOURCE.items()),
)
