"""The public address, held for the workers."""

from __future__ import annotations

import socket


class PortTaken(Exception):
    """An address that the gateway should listen on cannot be had."""

    def __init__(self, address: str, error: OSError, flag: str) -> None:
        super().__init__(
            f"cannot listen on {address}: {error.strerror or error}; "
            f"stop what holds it or pass another {flag}"
        )


class HeldPort:
    """The public address, bound but not listened on.

    The workers listen on it with SO_REUSEPORT. The kernel would let a second gateway join
    them in silence, so the address is first probed without that option; and while it is held,
    nobody else can take it between two workers.
    """

    def __init__(self, address: str) -> None:
        """Raises PortTaken."""
        self._host, _, port = address.rpartition(":")
        try:
            family, _, _, _, target = socket.getaddrinfo(
                self._host.strip("[]"), int(port), type=socket.SOCK_STREAM
            )[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # Without SO_REUSEPORT this fails where another gateway listens; with
                # SO_REUSEADDR it succeeds where only closed connections linger.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(target)
            self._socket = socket.socket(family, socket.SOCK_STREAM)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._socket.bind(target)
        except OSError as error:
            raise PortTaken(address, error, "--listen") from None

    @property
    def address(self) -> str:
        """`HOST:PORT` with the port in use, when 0 was asked for."""
        return f"{self._host}:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        """Let go of the port."""
        self._socket.close()
