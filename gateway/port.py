"""The public address, held for the workers."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from typing import Any


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
            # A name may stand for several addresses, and for one of them twice.
            targets = dict.fromkeys(
                (family, target)
                for family, _, _, _, target in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
            )
            self._hold_all(targets)
        except OSError as error:
            self.close()
            raise PortTaken(address, error, "--listen") from None

    def _hold_all(self, targets: Iterable[tuple[int, tuple[Any, ...]]]) -> None:
        """As grpc listens: on each address that this machine has, and on one at least."""
        lacking: OSError | None = None
        for family, (host, _, *rest) in targets:
            try:
                self._hold(family, (host, self._port, *rest))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                lacking = error  # for example ::1 where IPv6 is switched off
        if lacking is not None and not self._sockets:
            raise lacking

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
