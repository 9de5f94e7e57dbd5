"""A plain HTTP server of one adapter that answers as a test wants it to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from store.artifacts import CONFIG_FILE, WEIGHTS_FILE

FILES = {CONFIG_FILE: b'{"r": 8}', WEIGHTS_FILE: b"weights" * 100_000}

Answer = Callable[[BaseHTTPRequestHandler], None]


class AdapterServer(ThreadingHTTPServer):
    """Serves FILES under any folder, or for a name whatever `answers` says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, str]] = []
        """Method and path of each request."""
        self.released = threading.Event()
        """Lets answers end that wait for it."""

    @property
    def url(self) -> str:
        """Without a final slash."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: AdapterServer

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path))
        name = self.path.rpartition("/")[2]
        with suppress(ConnectionError):  # the client may have had enough
            self.server.answers.get(name, serve(FILES.get(name, b"")))(self)

    def do_HEAD(self) -> None:
        self.server.asked.append((self.command, self.path))

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def adapter_server() -> Iterator[AdapterServer]:
    """Serve until the block ends."""
    with AdapterServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def serve(body: bytes, *, length_bytes: int | None = None) -> Answer:
    """The body, announced with another length if one is given."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(length_bytes or len(body)))
        request.end_headers()
        request.wfile.write(body)

    return answer


def serve_status(status: int, **headers: str) -> Answer:
    """No body."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def serve_unannounced(request: BaseHTTPRequestHandler) -> None:
    """The weights without a length; they end with the connection."""
    request.send_response(200)
    request.end_headers()
    request.wfile.write(FILES[WEIGHTS_FILE])


def serve_endlessly(request: BaseHTTPRequestHandler) -> None:
    """Bytes without a length, until the client leaves."""
    request.send_response(200)
    request.end_headers()
    while True:
        request.wfile.write(bytes(65536))


def stall(request: BaseHTTPRequestHandler) -> None:
    """Half of the weights, and then nothing."""
    request.send_response(200)
    request.send_header("Content-Length", str(len(FILES[WEIGHTS_FILE])))
    request.end_headers()
    request.wfile.write(FILES[WEIGHTS_FILE][:1000])
    assert isinstance(request.server, AdapterServer)
    request.server.released.wait()
