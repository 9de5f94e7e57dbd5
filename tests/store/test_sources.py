"""Callers reach the places that the operator lists, and nothing else by them."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pytest

from store import sources
from store.artifacts import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    ArtifactStore,
    SourceUnusable,
)
from store.sources import AllowedSources, LocalFolder, RemoteFolder, SourceNotAllowed
from tests.store.adapter_server import (
    FILES,
    AdapterServer,
    Answer,
    adapter_server,
    serve,
    serve_endlessly,
    serve_status,
    serve_unannounced,
    stall,
)

ALLOWED = AllowedSources(
    ["/srv/adapters", "/srv/adapters/deep/er/", "https://Models.example/a/b/", "s3://bucket/team"]
)


def write_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def stage(allowed: AllowedSources, uri: str, root: Path) -> dict[str, bytes]:
    """The files as they were staged; nothing may be left behind if that fails."""
    try:
        with ArtifactStore(root).stage(allowed.resolve(uri)) as staged:
            return {path.name: path.read_bytes() for path in staged.path.iterdir()}
    finally:
        assert list((root / "staging").iterdir()) == []


# --- which places


@pytest.mark.parametrize(
    ("uri", "root", "names"),
    [
        ("/srv/adapters/pirate", "/srv/adapters", ("pirate",)),
        ("/srv/adapters", "/srv/adapters", ()),
        ("//srv/./adapters///a/b/", "/srv/adapters", ("a", "b")),
        ("file:///srv/adapters/a%20b", "/srv/adapters", ("a b",)),
        ("FILE://localhost/srv/adapters/a", "/srv/adapters", ("a",)),
        ("/srv/adapters/a?b#c%2e", "/srv/adapters", ("a?b#c%2e",)),
        ("/srv/adapters/deep/er/a", "/srv/adapters/deep/er", ("a",)),
    ],
)
def test_a_path_below_an_allowed_one_is_a_folder(
    uri: str, root: str, names: tuple[str, ...]
) -> None:
    assert ALLOWED.resolve(uri) == LocalFolder(Path(root), names)


@pytest.mark.parametrize(
    ("uri", "url"),
    [
        ("https://models.example/a/b/pirate", "https://models.example/a/b/pirate"),
        ("https://models.example/a/b", "https://models.example/a/b"),
        ("HTTPS://MODELS.example:443/a/b/c/", "https://models.example/a/b/c"),
        ("https://models.example/a/b/x%20y..z", "https://models.example/a/b/x%20y..z"),
        ("s3://bucket/team/pirate", "s3://bucket/team/pirate"),
    ],
)
def test_a_url_below_an_allowed_one_is_a_remote_folder(uri: str, url: str) -> None:
    place = ALLOWED.resolve(uri)
    assert isinstance(place, RemoteFolder)
    assert place.url == url


@pytest.mark.parametrize(
    "uri",
    [
        *("/srv", "/srv/adapters2/a", "/srv/adapters-old", "/", "/etc/passwd", "/srv/Adapters/a"),
        *("file:///etc", "file:/etc"),
        *("http://models.example/a/b/c", "https://models.example/a/bc", "https://models.example"),
        *("https://models.example:8443/a/b/c", "https://models.example./a/b/c"),
        *("https://x.models.example/a/b/c", "https://models.example.evil.example/a/b/c"),
        *("https://models.example/%61/b/c", "https://models.example/A/b/c"),
        *("s3://Bucket/team/a", "s3://bucket2/team/a", "s3://bucket/teams", "s3a://bucket/team/a"),
        *("gs://bucket/team/a", "memory://bucket/team"),
    ],
)
def test_a_place_outside_is_not_allowed(uri: str) -> None:
    with pytest.raises(SourceNotAllowed, match=r"upload the adapter.*--adapter-source-allow") as e:
        ALLOWED.resolve(uri)
    assert e.value.uri == uri
    with pytest.raises(SourceNotAllowed):
        AllowedSources([]).resolve(uri)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "neither an absolute path nor a URL"),
        ("srv/adapters/a", "neither an absolute path nor a URL"),
        ("./a", "neither an absolute path nor a URL"),
        ("~/a", "neither an absolute path nor a URL"),
        ("/srv/adapters/~root", "begins with '~'"),
        ("/srv/adapters/../../etc", r"has no '\.\.'"),
        ("/srv/adapters/a\0b", "is no path"),
        ("file:///srv/adapters/%2e%2e/etc", r"has no '\.\.'"),
        ("file:///srv/adapters/a%00", "is no path"),
        ("file:srv", "is no path"),
        ("file://host/srv/adapters/a", "reads no remote place"),
        ("local:///srv/adapters/a", "reads no remote place"),
        ("zip://a/b", "reads no remote place"),
        ("nosuch://bucket/a", "reads no remote place"),
        ("upload:1", "reads no remote place"),
        ("simplecache::https://models.example/a/b/c", "chain of URLs"),
        ("https://models.example/a/b/c::file:///etc", "chain of URLs"),
        ("https://u:secret@models.example/a/b/c", "not shown.*a user, a query"),
        ("https://models.example/a/b/c?sig=secret", "not shown.*a user, a query"),
        ("https://models.example/a/b/c#x", "a user, a query or a fragment"),
        ("https://models.example/a/b/../c", "'..' or an encoded slash"),
        ("https://models.example/a/b/%2E%2e/c", "'..' or an encoded slash"),
        ("https://models.example/a/b/.%2e;x/c", "'..' or an encoded slash"),
        ("https://models.example/a/b/./c", "'..' or an encoded slash"),
        ("https://models.example/a/b//c", "an empty name"),
        ("https://models.example/a/b/x%2f..%2f..", "'..' or an encoded slash"),
        ("https://models.example/a/b/x%5c..", "'..' or an encoded slash"),
        ("https://models.example/a/b/%252e%252e/c", "none twice"),
        ("https://models.example/a/b/%zz", "none twice"),
        ("https://models.example/a/b\\..\\c", "must not"),
        ("https://models.example/a/b/c\n", "must not"),
        ("ht\ttps://models.example/a/b/c", "must not"),
        (" https://models.example/a/b/c", "must not"),
        ("https://models.example:99999/a/b/c", "is no valid URL"),
        ("https://[::1/a/b", "chain of URLs"),
        ("https://[fe80/a/b", "is no valid URL"),
        ("https:///a/b/c", "no host or bucket"),
        ("https:a/b/c", "no host or bucket"),
        ("https://m\u043edels.example/a/b/c", "no host or bucket"),
    ],
)
def test_what_is_no_place_says_why(uri: str, message: str) -> None:
    with pytest.raises(SourceUnusable, match=message) as caught:
        ALLOWED.resolve(uri)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "prefix", ["", "adapters", "~/a", "/a/../b", "https://u:secret@h/a", "s3:"]
)
def test_an_operators_mistake_is_told_at_start(prefix: str) -> None:
    with pytest.raises(ValueError, match="the allowed source") as caught:
        AllowedSources(["/srv", prefix])
    assert "secret" not in str(caught.value)


# --- folders of this machine


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_a_folder_below_a_linked_root_is_read(tmp_path: Path, root: Path) -> None:
    write_adapter(tmp_path / "real" / "team" / "pirate")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    allowed = AllowedSources([str(tmp_path / "link")])
    assert stage(allowed, f"{tmp_path}/link/team/pirate", root) == FILES
    assert stage(AllowedSources(["/"]), str(tmp_path / "real/team/pirate"), root) == FILES


@pytest.mark.parametrize("linked", ["allowed/team", "allowed/team/pirate"])
def test_a_link_below_the_root_leads_nowhere(tmp_path: Path, root: Path, linked: str) -> None:
    outside = write_adapter(tmp_path / "outside" / "pirate")
    link = tmp_path / linked
    link.parent.mkdir(parents=True)
    link.symlink_to(outside if link.name == "pirate" else outside.parent)
    allowed = AllowedSources([str(tmp_path / "allowed")])
    with pytest.raises(SourceUnusable, match="reached through a symbolic link"):
        stage(allowed, str(tmp_path / "allowed/team/pirate"), root)


def test_a_link_that_is_swapped_in_at_any_moment_leads_nowhere(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = write_adapter(tmp_path / "allowed" / "team" / "pirate")
    outside = write_adapter(tmp_path / "outside" / "team" / "pirate")
    (outside / WEIGHTS_FILE).write_bytes(b"secret")
    team, opened = inside.parent, os.open

    def swap_then_open(path: str | Path, *arguments: int, **options: int | None) -> int:
        if path in moments:
            team.rename(tmp_path / f"moved before {path}")
            team.symlink_to(outside.parent)
        return opened(path, *arguments, **options)  # type: ignore[arg-type]

    for moment in ("team", "pirate", CONFIG_FILE, WEIGHTS_FILE):
        moments = {moment}
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", swap_then_open)
            allowed = AllowedSources([str(tmp_path / "allowed")])
            if moment == "team":
                with pytest.raises(SourceUnusable, match="symbolic link"):
                    stage(allowed, str(inside), root)
            else:
                assert stage(allowed, str(inside), root) == FILES
        team.unlink()
        (tmp_path / f"moved before {moment}").rename(team)


def test_a_folder_that_cannot_be_read_says_why(tmp_path: Path, root: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    allowed = AllowedSources([str(tmp_path)])
    for name, message in {
        "nowhere": "does not exist",
        "file": "is no folder",
        "a" * 300: "cannot be opened",
        "empty": "holds no adapter_config.json",
    }.items():
        with pytest.raises(SourceUnusable, match=message):
            stage(allowed, str(tmp_path / name), root)


# --- remote folders


@pytest.fixture
def server() -> Iterator[AdapterServer]:
    with adapter_server() as server:
        yield server


@pytest.mark.parametrize("weights", [serve(FILES[WEIGHTS_FILE]), serve_unannounced])
def test_a_remote_folder_is_read_by_two_requests(
    server: AdapterServer, root: Path, weights: Answer
) -> None:
    server.answers[WEIGHTS_FILE] = weights
    assert stage(AllowedSources([server.url]), f"{server.url}/team/pirate/", root) == FILES
    assert server.asked == [
        ("GET", f"/team/pirate/{CONFIG_FILE}"),
        ("GET", f"/team/pirate/{WEIGHTS_FILE}"),
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (serve_status(404), "does not exist; name a folder"),
        (serve_status(403), "may not be read with the gateway's credentials"),
        (serve_status(500), "HTTP status 500; look at the server"),
        (serve_status(206), "HTTP status 206"),
        (serve_status(302, Location="http://127.0.0.1:1/x"), "redirects are not followed"),
        (serve_status(308, Location="/elsewhere"), "redirects are not followed"),
        (serve_endlessly, "has more than 1048576 bytes"),
        (serve(b"", length_bytes=1024**4), "has 1099511627776 bytes, the limit is 4294967296"),
        (serve(b"cut off", length_bytes=1000), r"could not be read to its end \(ClientPayload"),
        (stall, "was not answered in time"),
    ],
)
def test_a_server_that_misbehaves_is_no_source(
    server: AdapterServer,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Answer,
    message: str,
) -> None:
    monkeypatch.setattr("store.artifacts.MAX_WEIGHTS_BYTES", 1024**2)
    server.answers[WEIGHTS_FILE] = answer
    allowed = AllowedSources([server.url], idle_timeout_s=0.5)
    with pytest.raises(SourceUnusable, match=message) as caught:
        stage(allowed, f"{server.url}/pirate", root)
    assert WEIGHTS_FILE in str(caught.value)
    assert [path for _, path in server.asked] == [f"/pirate/{name}" for name in FILES]


def test_a_config_that_is_too_large_is_not_taken(server: AdapterServer, root: Path) -> None:
    server.answers[CONFIG_FILE] = serve(bytes(MAX_CONFIG_BYTES + 1))
    with pytest.raises(SourceUnusable, match="has more than 65536 bytes"):
        stage(AllowedSources([server.url]), f"{server.url}/pirate", root)


def test_no_more_is_taken_than_a_server_announces(server: AdapterServer, root: Path) -> None:
    server.answers[WEIGHTS_FILE] = serve(b"weights and more", length_bytes=7)
    # aiohttp refuses what is left over, unless it comes only after aiohttp has hung up.
    with contextlib.suppress(SourceUnusable):
        staged = stage(AllowedSources([server.url]), f"{server.url}/pirate", root)
        assert staged[WEIGHTS_FILE] == b"weights"


def test_a_server_that_trickles_is_left(
    server: AdapterServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_TRANSFER_S", 0.0)
    server.answers[WEIGHTS_FILE] = serve_endlessly
    with pytest.raises(SourceUnusable, match="took more than 0 s"):
        stage(AllowedSources([server.url]), f"{server.url}/pirate", root)


def test_a_server_that_is_not_there_is_named(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(SourceUnusable, match=rf"{url}.*Connection refused.*check host and port"):
        stage(AllowedSources([url]), f"{url}/pirate", root)


def test_a_driver_that_is_not_installed_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(SourceUnusable, match=r"s3://bucket/team/a needs a driver of fsspec"):
        stage(ALLOWED, "s3://bucket/team/a", root)


def test_another_protocol_is_read_by_its_driver(root: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name, content in FILES.items():
        memory.pipe(f"memory://bucket/pirate/{name}", content)
    allowed = AllowedSources(["memory://bucket"])
    assert stage(allowed, "memory://bucket/pirate", root) == FILES
    with pytest.raises(SourceUnusable, match=r"memory://bucket/sql/.*does not exist"):
        stage(allowed, "memory://bucket/sql", root)


def test_what_a_driver_says_is_not_passed_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("key=secret")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "_open", fail)
    with pytest.raises(SourceUnusable, match=r"to its end \(RuntimeError\)") as caught:
        stage(AllowedSources(["memory://bucket"]), "memory://bucket/a", root)
    assert "secret" not in str(caught.value)
