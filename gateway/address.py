"""An address to listen on: `HOST:PORT`."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator

_HOST_AND_PORT = re.compile(r"(\[[^\[\]]+\]|[^\[\]:]+):([0-9]{1,5})")
"""An IPv6 address stands in brackets, or nobody could tell where its port begins."""


def _address(value: str) -> str:
    found = _HOST_AND_PORT.fullmatch(value)
    if found is None or not _is_host(found[1]) or int(found[2]) > 65535:
        raise ValueError(f"{value!r} is no HOST:PORT, for example 127.0.0.1:50051 or [::1]:50051")
    return value


def _is_host(host: str) -> bool:
    """Whether it can be looked up: as a name, or as an IPv6 address in brackets."""
    try:
        if host.startswith("["):
            ipaddress.IPv6Address(host.strip("[]"))
        else:
            host.encode("idna")  # as getaddrinfo does
    except ValueError:
        return False
    return True


Address = Annotated[str, AfterValidator(_address)]
"""`HOST:PORT`. Port 0 takes a free one."""


def is_local_peer(peer: str) -> bool:
    """Whether a caller, named as gRPC does (`ipv4:127.0.0.1:4711`), is on this machine."""
    kind, _, address = unquote(peer).partition(":")
    if kind == "unix":
        return True
    try:
        host = ipaddress.ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    mapped = host.ipv4_mapped if isinstance(host, ipaddress.IPv6Address) else None
    return (mapped or host).is_loopback


def is_loopback(address: str) -> bool:
    """Whether `HOST:PORT` can be reached from this machine alone."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
