"""A proxy that lets nobody out, and knows who asked."""

from __future__ import annotations

import contextlib
import socket
import threading

MAX_REQUEST_BYTES = 4096
NAMES = ("http_proxy", "https_proxy", "all_proxy")


class Proxy:
    """For HTTP. Listens on this machine from construction until `close`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        """First line of each request; empty: a connection and nothing more."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a process asks here for whatever it wants of the network."""
        url = "http://{}:{}".format(*self._listener.getsockname())
        ours = {spelt: url for name in NAMES for spelt in (name, name.upper())}
        return {**ours, "no_proxy": "", "NO_PROXY": ""}

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(1.0)
                    self.asked.append("")
                    request = connection.recv(MAX_REQUEST_BYTES)
                    self.asked[-1] = request.split(b"\r\n")[0].decode(errors="replace")
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
