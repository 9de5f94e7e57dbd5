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
        self._port = int(port)
        self._sockets: list[socket.socket] = []
        try:
            host = self._host.strip("[]")
            # A name may stand for several addresses, and grpc listens on each.
            for family, _, _, _, target in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
                self._hold(family, (target[0], self._port, *target[2:]))
        except OSError as error:
            self.close()
            raise PortTaken(address, error, "--listen") from None

    def _hold(self, family: int, target: tuple[object, ...]) -> None:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # Without SO_REUSEPORT this fails where another gateway listens; with
            # SO_REUSEADDR it succeeds where only closed connections linger.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
        held = socket.socket(family, socket.SOCK_STREAM)
        self._sockets.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(target)
        self._port = held.getsockname()[1]

    @property
    def address(self) -> str:
        """`HOST:PORT` with the port in use, when 0 was asked for."""
        return f"{self._host}:{self._port}"

    def close(self) -> None:
        """Let go of the port."""
        for held in self._sockets:
            held.close()
