"""The held port: ours alone, and yet the workers can listen on it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from gateway.port import HeldPort, PortTaken
from gateway.server import OPTIONS

LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def held(address: str = f"{LOOPBACK}:0") -> Iterator[HeldPort]:
    port = HeldPort(address)
    try:
        yield port
    finally:
        port.close()


@contextlib.contextmanager
def bound(port: int = 0, *, reuse_port: bool = False, listen: bool = True) -> Iterator[int]:
    """Somebody else on a port."""
    with socket.socket() as other:
        if reuse_port:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((LOOPBACK, port))
        if listen:
            other.listen()
        yield int(other.getsockname()[1])


def number(port: HeldPort) -> int:
    return int(port.address.rpartition(":")[2])


def resolve_to(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Let every name stand for these addresses."""

    def getaddrinfo(host: object, port: int, **options: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_port_0_becomes_a_free_one() -> None:
    with held() as one, held() as other:
        assert one.address.startswith(f"{LOOPBACK}:")
        assert 0 < number(one) != number(other) > 0


def test_the_given_port_is_held() -> None:
    with bound() as free:
        pass
    with held(f"{LOOPBACK}:{free}") as port:
        assert port.address == f"{LOOPBACK}:{free}"


def test_ipv6_keeps_its_brackets() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with held("[::1]:0") as port:
        assert port.address == f"[::1]:{number(port)}"


@pytest.mark.parametrize("reuse_port", [False, True], ids=["plain", "reuseport"])
def test_a_port_that_somebody_listens_on_is_taken(reuse_port: bool) -> None:
    """Also by another gateway's workers, whom the kernel would let us join in silence."""
    with bound(reuse_port=reuse_port) as taken, pytest.raises(PortTaken) as caught:
        HeldPort(f"{LOOPBACK}:{taken}")
    assert str(caught.value) == (
        f"cannot listen on {LOOPBACK}:{taken}: {os.strerror(errno.EADDRINUSE)}; "
        "stop what holds it or pass another --listen"
    )


def test_a_port_that_another_gateway_holds_is_taken_before_its_workers_listen() -> None:
    with held() as port, pytest.raises(PortTaken):
        HeldPort(port.address)


def test_a_port_that_is_refused_stays_with_its_holder() -> None:
    with bound() as taken:
        with pytest.raises(PortTaken):
            HeldPort(f"{LOOPBACK}:{taken}")
        with socket.create_connection((LOOPBACK, taken), timeout=5):
            pass


def test_nobody_else_can_take_a_held_port() -> None:
    with held() as port, pytest.raises(OSError, match="in use"), bound(number(port)):
        pass


def test_a_held_port_takes_no_connection_itself() -> None:
    with held() as port, pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, number(port)), timeout=5)


def test_several_workers_listen_on_a_held_port() -> None:
    with (
        held() as port,
        bound(number(port), reuse_port=True),
        bound(number(port), reuse_port=True),
        socket.create_connection((LOOPBACK, number(port)), timeout=5) as client,
    ):
        assert client.getpeername() == (LOOPBACK, number(port))


async def test_a_grpc_server_with_our_options_binds_a_held_port() -> None:
    with held() as port:
        server = grpc.aio.server(options=list(OPTIONS))
        assert server.add_insecure_port(port.address) == number(port)
        await server.start()
        with pytest.raises(PortTaken):
            HeldPort(port.address)
        await server.stop(0)


def test_a_worker_that_ends_leaves_the_port_with_its_holder() -> None:
    with held() as port:
        with bound(number(port), reuse_port=True):
            pass
        with pytest.raises(PortTaken):
            HeldPort(port.address)
        with bound(number(port), reuse_port=True):
            pass


def test_connections_that_linger_after_a_gateway_are_no_obstacle_for_the_next() -> None:
    with held() as port:
        address = port.address
        with socket.socket() as worker:
            worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            worker.bind((LOOPBACK, number(port)))
            worker.listen()
            with socket.create_connection((LOOPBACK, number(port)), timeout=5) as client:
                served, _ = worker.accept()
                served.close()  # who closes first keeps the connection in TIME_WAIT
                assert client.recv(1) == b""
    with held(address):
        pass


def test_a_port_is_free_again_after_close_and_closing_twice_is_safe() -> None:
    with held() as port:
        port.close()
        with bound(number(port)):
            pass


def test_every_address_of_a_name_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, LOOPBACK, "127.0.0.2")
    with held("twins:0") as port:
        assert port.address == f"twins:{number(port)}"
        for host in (LOOPBACK, "127.0.0.2"):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((host, number(port)))


def test_a_name_whose_second_address_is_taken_is_taken_and_nothing_of_it_stays_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve_to(monkeypatch, "127.0.0.2", LOOPBACK)
    with bound() as taken:
        with pytest.raises(PortTaken, match="twins"):
            HeldPort(f"twins:{taken}")
        with socket.socket() as other:
            other.bind(("127.0.0.2", taken))


def test_a_name_that_stands_for_one_address_twice_is_held_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As glibc answers for localhost when /etc/hosts names it for ::1 too."""
    resolve_to(monkeypatch, LOOPBACK, LOOPBACK)
    with held("localhost:0") as port:
        assert number(port)


def test_an_address_of_a_name_that_this_machine_lacks_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As ::1 of localhost is in a container without IPv6; grpc leaves it out as well."""
    resolve_to(monkeypatch, "192.0.2.1", LOOPBACK)
    with held("localhost:0") as port, pytest.raises(OSError, match="in use"), bound(number(port)):
        pass


def test_an_address_of_another_machine_is_refused_with_its_cause() -> None:
    with pytest.raises(PortTaken, match=os.strerror(errno.EADDRNOTAVAIL)):
        HeldPort("192.0.2.1:50051")


def test_a_name_that_is_unknown_is_refused_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(PortTaken) as caught:
        HeldPort("nowhere.invalid:50051")
    assert str(caught.value).startswith(
        "cannot listen on nowhere.invalid:50051: Name or service not known; "
    )


def test_the_flag_to_change_is_named() -> None:
    error = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    text = str(PortTaken("127.0.0.1:9464", error, "--metrics-listen"))
    assert text.startswith("cannot listen on 127.0.0.1:9464: Address already in use; ")
    assert text.endswith("pass another --metrics-listen")


def test_an_error_without_a_number_still_says_something() -> None:
    assert "no luck" in str(PortTaken("127.0.0.1:1", OSError("no luck"), "--listen"))
