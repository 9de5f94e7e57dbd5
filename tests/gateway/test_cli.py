"""The `gateway` command as a process of its own, against a real gRPC server in this one."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import types
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from typer.testing import CliRunner

from gateway.cli import app
from lora_gateway.v1 import inference_pb2 as pb
from tests.client.fake_inference import UNAVAILABLE, FakeInference, served

ROOT = Path(__file__).parents[2]
SOON_S = 20.0
"""For what takes a second; a test that needs it all has failed."""

HEAVY = {"torch", "vllm", "pydantic", "uvloop", "prometheus_client", "opentelemetry", "matplotlib"}
SERVER = {"gateway.server", "gateway.serve", "gateway.inference", "engine", "store", "trainer"}


@dataclass(frozen=True, slots=True)
class Result:
    code: int | None
    output: str
    errors: str


@dataclass(frozen=True, slots=True)
class Certificate:
    """For server and client alike, and its own CA."""

    chain: Path
    key: Path

    @classmethod
    def self_signed(cls, folder: Path) -> Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]),
                critical=False,
            )
            .sign(key, hashes.SHA256())
        )
        written = cls(folder / "cert.pem", folder / "key.pem")
        written.chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        written.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return written


@pytest.fixture
def inference() -> FakeInference:
    return FakeInference()


@pytest.fixture
async def target(inference: FakeInference) -> AsyncIterator[str]:
    async with served(inference) as target:
        yield target


async def started(
    *args: str, target: str = "127.0.0.1:1", program: Sequence[str] = ("-m", "gateway")
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", *program, *args),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={
            "PYTHONPATH": f"{ROOT / 'clients' / 'python'}:{ROOT}",
            "GATEWAY_TARGET": target,
            "COLUMNS": "200",
        },
    )


async def ended(process: asyncio.subprocess.Process, typed: str = "") -> Result:
    output, errors = await asyncio.wait_for(process.communicate(typed.encode()), SOON_S)
    assert b"Traceback" not in errors
    return Result(process.returncode, output.decode(), errors.decode())


async def gateway(*args: str, target: str, typed: str = "") -> Result:
    return await ended(await started(*args, target=target), typed)


# --- generate


async def test_generate_prints_the_answer_and_nothing_else(
    target: str, inference: FakeInference
) -> None:
    result = await gateway(
        *("generate", "ahoy there", "--adapter", "pirate", "--version", "2"),
        *("--max-tokens", "8", "--temperature", "0", "--seed", "7"),
        *("--stop", "END", "--stop", "FIN"),
        target=target,
    )
    assert result == Result(0, "ahoy there\n", "")
    assert inference.requests == [
        pb.GenerateRequest(
            text="ahoy there",
            adapter="pirate",
            version=2,
            sampling=pb.SamplingParams(max_tokens=8, temperature=0, seed=7, stop=["END", "FIN"]),
        )
    ]


async def test_generate_prints_tokens_as_they_come(target: str, inference: FakeInference) -> None:
    inference.hangs = True
    process = await started("generate", "one two", target=target)
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readexactly(3), SOON_S) == b"one"
    process.send_signal(signal.SIGINT)
    result = await ended(process)
    assert result.code != 0
    await asyncio.wait_for(inference.cancelled.wait(), SOON_S)


async def test_generate_waits_for_the_whole_answer_when_told_so(target: str) -> None:
    assert await gateway("generate", "one two", "--no-stream", target=target) == Result(
        0, "one two\n", ""
    )


async def test_generate_reads_a_prompt_from_standard_input(target: str) -> None:
    result = await gateway("generate", "-", target=target, typed="from a pipe")
    assert result.output == "from a pipe\n"


async def test_generate_prints_json_as_one_document_or_one_event_a_line(target: str) -> None:
    whole = await gateway("generate", "one", "--json", "--no-stream", target=target)
    answer = json.loads(whole.output)
    assert answer["completions"][0]["text"] == "one"
    assert answer["completions"][0]["finish_reason"] == "FINISH_REASON_STOP"
    assert answer["usage"]["cached_tokens"] == 0

    streamed = await gateway("generate", "one two", "--json", target=target)
    events = [json.loads(line) for line in streamed.output.splitlines()]
    assert [list(event) for event in events] == [["started"], ["delta"], ["delta"], ["finished"]]
    assert events[2]["delta"]["text"] == " two"


# --- chat


async def test_chat_sends_the_history_with_every_line(
    target: str, inference: FakeInference
) -> None:
    result = await gateway(
        *("chat", "--adapter", "pirate", "--system", "Be brief."),
        target=target,
        typed="hello\n\nhow are you\n",
    )
    assert result == Result(0, "hello\nhow are you\n", "")
    assert [
        [(message.role, message.content) for message in request.chat.messages]
        for request in inference.requests
    ] == [
        [("system", "Be brief."), ("user", "hello")],
        [
            ("system", "Be brief."),
            ("user", "hello"),
            ("assistant", "hello"),
            ("user", "how are you"),
        ],
    ]


async def test_ctrl_c_cancels_the_answer_and_not_the_chat(
    target: str, inference: FakeInference
) -> None:
    inference.hangs = True
    process = await started("chat", target=target)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"one two\n")
    assert await asyncio.wait_for(process.stdout.readexactly(3), SOON_S) == b"one"

    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(inference.cancelled.wait(), SOON_S)
    inference.hangs = False
    result = await ended(process, "three\n")

    assert result == Result(0, "\nthree\n", "")
    assert [message.content for message in inference.requests[-1].chat.messages] == [
        "one two",
        "one",
        "three",
    ]


async def test_a_chat_from_a_pipe_ends_with_its_first_error(
    target: str, inference: FakeInference
) -> None:
    inference.failures.append(
        status_pb2.Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="no such adapter")
    )
    result = await gateway("chat", target=target, typed="hello\nagain\n")
    assert result == Result(1, "", "error: NOT_FOUND: no such adapter\n")


# --- model


async def test_model_shows_every_field_as_a_table_or_as_json(
    target: str, inference: FakeInference
) -> None:
    inference.model.base_model = "org/[model]"
    table = await gateway("model", target=target)
    rows = dict(
        line.split(maxsplit=1) for line in table.output.splitlines() if "  " in line.strip()
    )
    assert rows["base_model"].strip() == "org/[model]"
    assert rows["limits.max_model_len"].strip() == "2048"

    document = json.loads((await gateway("model", "--json", target=target)).output)
    assert document["base_model"] == "org/[model]"
    assert document["limits"]["max_model_len"] == 2048


# --- errors


async def test_an_error_names_code_reason_message_violations_and_when_to_retry(
    target: str, inference: FakeInference
) -> None:
    details = [any_pb2.Any() for _ in range(3)]
    details[0].Pack(
        error_details_pb2.ErrorInfo(
            reason="INVALID_FIELD", domain="lora-gateway", metadata={"request_id": "r-7"}
        )
    )
    details[1].Pack(
        error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
                for field, description in (
                    ("sampling.top_p", "must be in (0, 1]"),
                    ("version", "needs an adapter"),
                )
            ]
        )
    )
    details[2].Pack(
        error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000))
    )
    inference.failures.append(
        status_pb2.Status(
            code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message="two\nfields", details=details
        )
    )

    assert await gateway("generate", "hi", target=target) == Result(
        1,
        "",
        "error: INVALID_ARGUMENT INVALID_FIELD: two fields\n"
        "  sampling.top_p: must be in (0, 1]\n"
        "  version: needs an adapter\n"
        "  retry in 1.5 s\n"
        "  request id in the server's log: r-7\n",
    )


async def test_nobody_listening_gives_the_cure() -> None:
    # Port 1 of the loopback: nothing listens there.
    result = await gateway("model", target="127.0.0.1:1")
    assert result.code == 1
    first, *others = result.errors.splitlines()
    assert first.startswith("error: UNAVAILABLE: ")
    assert others == ["  is the gateway running at 127.0.0.1:1? make serve"]


async def test_a_failure_amid_the_answer_starts_a_line_of_its_own(
    target: str, inference: FakeInference
) -> None:
    inference.cuts.append(UNAVAILABLE)
    result = await gateway("generate", "one two", target=target)
    assert result.code == 1
    assert result.output == "one\n"
    assert result.errors.startswith("error: UNAVAILABLE: not now\n")


async def test_a_value_that_fits_no_message_is_one_line_too(target: str) -> None:
    result = await gateway("generate", "hi", "--seed", str(2**64), target=target)
    assert result.code == 1
    assert result.errors.startswith("error: ")
    assert result.errors.count("\n") == 1


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate.self_signed(tmp_path_factory.mktemp("tls"))


@pytest.fixture
async def mutual_tls_target(
    inference: FakeInference, certificate: Certificate
) -> AsyncIterator[str]:
    chain, key = certificate.chain.read_bytes(), certificate.key.read_bytes()
    credentials = grpc.ssl_server_credentials(
        [(key, chain)], root_certificates=chain, require_client_auth=True
    )
    async with served(inference, credentials) as target:
        yield target


async def test_mutual_tls_needs_ca_certificate_and_key(
    mutual_tls_target: str, certificate: Certificate
) -> None:
    result = await gateway(
        *("generate", "hi", "--tls-ca", str(certificate.chain)),
        *("--tls-cert", str(certificate.chain), "--tls-key", str(certificate.key)),
        target=mutual_tls_target,
    )
    assert result == Result(0, "hi\n", "")


async def test_a_server_with_tls_is_unavailable_in_plain_text(mutual_tls_target: str) -> None:
    result = await gateway("model", target=mutual_tls_target)
    assert result.code == 1
    assert result.errors.startswith("error: UNAVAILABLE: ")


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    certificate = tmp_path / "cert.pem"
    certificate.touch()
    result = CliRunner().invoke(app, ["model", "--tls-cert", str(certificate)])
    assert result.exit_code == 2
    assert "--tls-key belong together" in result.output


# --- serve, start


def test_serve_hands_every_argument_on_and_exits_with_its_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    def main(argv: list[str]) -> int:
        seen.extend(argv)
        return 3

    module = types.ModuleType("gateway.serve")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gateway.serve", module)
    arguments = ["--model", "tiny", "--adapter=a=b", "--help", "-x", "rest"]

    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 3
    assert seen == arguments


def test_the_help_lists_the_commands() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in ("serve", "generate", "chat", "model"))


async def test_importing_the_command_imports_no_server_and_nothing_heavy() -> None:
    program = ("-c", "import gateway.cli, sys; print(*sys.modules)")
    result = await ended(await started(program=program))
    imported = set(result.output.split())
    assert "lora_gateway.client" in imported
    assert not imported & (HEAVY | SERVER)
