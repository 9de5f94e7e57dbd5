"""The server's options are real, and TLS lets in whom it should."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from engine.fake import Script
from gateway.server import HOST_OPTIONS, OPTIONS
from gateway.settings import Settings
from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.gateway.certificates import Authority
from tests.gateway.conftest import FakeGateway, start_fake_gateway

GRPC_BINARY = Path(find_spec("grpc._cython.cygrpc").origin).read_bytes()  # type: ignore[union-attr,arg-type]


def known(key: str) -> bool:
    """Whether the installed gRPC has this channel argument: it ignores others in silence."""
    return re.search(rb"(?<![a-z._])" + re.escape(key.encode()) + rb"\0", GRPC_BINARY) is not None


@pytest.mark.parametrize("key", [key for key, _ in {**dict(OPTIONS), **dict(HOST_OPTIONS)}.items()])
def test_each_option_is_known_to_the_installed_grpc(key: str) -> None:
    assert known(key)


def test_a_misspelt_option_would_be_noticed() -> None:
    assert not known("grpc.http2.min_recv_ping_interval_without_data_ms")


@dataclass
class TlsGateway:
    """A gateway with a certificate, and who signed it."""

    gateway: FakeGateway
    authority: Authority

    async def call(self, credentials: grpc.ChannelCredentials | None) -> None:
        """One call with these credentials, or in plain text."""
        channel = (
            grpc.aio.insecure_channel(self.gateway.address)
            if credentials is None
            else grpc.aio.secure_channel(self.gateway.address, credentials)
        )
        async with channel:
            await InferenceStub(channel).GetModel(pb.GetModelRequest(), timeout=5)


@pytest_asyncio.fixture(params=[False, True], ids=["tls", "mutual tls"])
async def tls(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TlsGateway]:
    authority = Authority(tmp_path / "ca.pem")
    cert, key = authority.issue(tmp_path, "server")
    settings = Settings(
        tls_cert=cert, tls_key=key, tls_client_ca=authority.path if request.param else None
    )
    gateway = await start_fake_gateway(Script(), settings=settings)
    yield TlsGateway(gateway, authority)
    await gateway.close()


async def test_a_client_that_trusts_the_authority_is_served(
    tls: TlsGateway, tmp_path: Path
) -> None:
    cert, key = tls.authority.issue(tmp_path, "client")
    trusted = grpc.ssl_channel_credentials(
        tls.authority.path.read_bytes(), key.read_bytes(), cert.read_bytes()
    )
    await tls.call(trusted)


async def test_who_trusts_another_authority_or_speaks_plain_text_is_not(
    tls: TlsGateway, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other.pem")
    for credentials in (grpc.ssl_channel_credentials(other.path.read_bytes()), None):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await tls.call(credentials)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("tls", [True], indirect=True, ids=["mutual tls"])
async def test_mutual_tls_wants_a_certificate_of_its_own_authority(
    tls: TlsGateway, tmp_path: Path
) -> None:
    root = tls.authority.path.read_bytes()
    other = Authority(tmp_path / "other.pem")
    cert, key = other.issue(tmp_path, "stranger")
    for credentials in (
        grpc.ssl_channel_credentials(root),
        grpc.ssl_channel_credentials(root, key.read_bytes(), cert.read_bytes()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await tls.call(credentials)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_reflection_can_be_switched_off() -> None:
    gateway = await start_fake_gateway(Script(), settings=Settings(reflection=False))
    call: Any = gateway.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(iter([b""])).read()
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await gateway.close()
