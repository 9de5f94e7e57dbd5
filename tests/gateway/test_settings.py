"""Flags, environment and defaults become settings, or one line that names the flag."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from gateway.address import is_loopback
from gateway.settings import Settings, SettingsError
from tests.gateway.certificates import Authority

FIELDS = Settings.model_fields
FLAGS = {name: "--" + name.replace("_", "-") for name in FIELDS}


@pytest.fixture(autouse=True)
def no_gateway_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("GATEWAY_"):
            monkeypatch.delenv(name)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca.pem")


def refusal(*argv: str) -> str:
    """The one line that says why these flags cannot be."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_argv(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- where a setting comes from ---------------------------------------------


def test_without_flags_and_environment_there_are_the_documented_defaults() -> None:
    settings = Settings.from_argv([])
    assert (settings.model, settings.dtype, settings.quantization) == ("smollm2-135m", "auto", None)
    assert (settings.listen, settings.metrics_listen) == ("127.0.0.1:50051", "127.0.0.1:9464")
    assert (settings.state_dir, settings.adapter) == (Path("state"), {})
    assert settings.adapter_source_allow == []
    assert (settings.max_model_len, settings.max_num_seqs) == (2048, 256)
    assert settings.gpu_memory_utilization == 0.9
    assert (settings.max_loras, settings.max_cpu_loras, settings.max_lora_rank) == (8, 64, "32")
    assert (settings.default_max_tokens, settings.default_temperature) == (512, 0.7)
    assert settings.default_unary_deadline_s == 30
    assert settings.default_stream_deadline_s == 300
    assert (settings.workers, settings.shards, settings.devices_per_shard) == (None, 1, 1)
    assert not settings.insecure


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("model", "tiny", "tiny"),
        ("dtype", "float32", "float32"),
        ("quantization", "fp8", "fp8"),
        ("listen", "[::1]:0", "[::1]:0"),
        ("state_dir", "/var/lib/gateway", Path("/var/lib/gateway")),
        ("workers", "2", 2),
        ("gpu_memory_utilization", "0.5", 0.5),
        ("max_lora_rank", "64", "64"),
        ("default_unary_deadline_s", "1.5", 1.5),
        ("otlp_endpoint", "http://127.0.0.1:4317", "http://127.0.0.1:4317"),
        ("adapter", "a=/x,b=/y", {"a": Path("/x"), "b": Path("/y")}),
        ("adapter_source_allow", "/x,s3://b/y", ["/x", "s3://b/y"]),
    ],
)
def test_a_flag_and_its_variable_mean_the_same(
    field: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert getattr(Settings.from_argv([FLAGS[field], text]), field) == value
    monkeypatch.setenv(f"GATEWAY_{field.upper()}", text)
    assert getattr(Settings.from_argv([]), field) == value


def test_a_flag_wins_over_its_variable_and_that_over_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GATEWAY_WORKERS", "2")
    monkeypatch.setenv("GATEWAY_MAX_LORAS", "4")
    settings = Settings.from_argv(["--workers", "3"])
    assert (settings.workers, settings.max_loras, settings.max_num_seqs) == (3, 4, 256)


@pytest.mark.parametrize("field", ["insecure", "reflection"])
def test_a_switch_has_an_opposite_that_wins_over_its_variable(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert getattr(Settings.from_argv([FLAGS[field]]), field) is True
    monkeypatch.setenv(f"GATEWAY_{field.upper()}", "true")
    assert getattr(Settings.from_argv([]), field) is True
    assert getattr(Settings.from_argv([f"--no-{field}"]), field) is False


def test_a_wrong_variable_is_told_like_a_wrong_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_WORKERS", "many")
    assert refusal().startswith("--workers: ")


def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`GATEWAY_TARGET` is the client commands' own."""
    monkeypatch.setenv("GATEWAY_TARGET", "example.com:50051")
    monkeypatch.setenv("MODEL", "other")
    assert Settings.from_argv([]) == Settings()


def test_settings_do_not_change() -> None:
    settings: Any = Settings.from_argv([])
    with pytest.raises(ValueError, match="frozen"):
        settings.workers = 2


@pytest.mark.parametrize(
    "argv", [["--nosuch"], ["--state", "x"], ["stray"]], ids=["unknown", "shortened", "stray"]
)
def test_an_unknown_flag_exits_as_argparse_does(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        Settings.from_argv(argv)
    assert caught.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"gateway serve: error: unrecognized arguments: {' '.join(argv)}"


def test_help_lists_every_flag_with_what_it_is_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        Settings.from_argv(["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, flag in FLAGS.items():
        assert re.search(rf"{flag}(?![a-z-])", shown), flag
        description = FIELDS[name].description
        assert description, f"{name} says nothing"
        assert " ".join(description.split()) in shown


# --- adapters ----------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["--adapter", "a=/x", "--adapter", "b=y/z"],
        ["--adapter", "a=/x,b=y/z"],
        ["--adapter=a=/x", "--adapter=b=y/z,"],
    ],
    ids=["repeated", "with a comma", "with a stray comma"],
)
def test_adapters_are_repeated_or_joined_by_commas(argv: list[str]) -> None:
    assert Settings.from_argv(argv).adapter == {"a": Path("/x"), "b": Path("y/z")}


@pytest.mark.parametrize("path", ["/x=y", "/with space", "/[x", "/{x", '/"x', "~/x"])
def test_the_path_of_an_adapter_may_hold_anything_but_a_comma(path: str) -> None:
    assert Settings.from_argv(["--adapter", f"a={path}"]).adapter == {"a": Path(path)}


def test_adapters_given_by_flags_replace_those_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GATEWAY_ADAPTER", "a=/x,b=/y")
    assert Settings.from_argv(["--adapter", "c=/z"]).adapter == {"c": Path("/z")}


def test_an_empty_variable_names_no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_ADAPTER", "")
    assert Settings.from_argv([]).adapter == {}


@pytest.mark.parametrize("again", [["a=/y"], ["a=/x"]], ids=["another path", "the same path"])
def test_an_adapter_that_is_given_twice_is_refused(again: list[str]) -> None:
    line = refusal("--adapter", "a=/x", "--adapter", *again)
    assert line == "--adapter: adapter 'a' is given twice; give each name once"
    assert refusal("--adapter", f"a=/x,{again[0]}") == line


@pytest.mark.parametrize("entry", ["pirate", "pirate=", "{", '{"a": "/x"}', "a=/x,b"])
def test_an_adapter_that_is_no_name_and_path_is_told_the_format(entry: str) -> None:
    line = refusal("--adapter", entry)
    assert line.startswith("--adapter: ")
    assert line.endswith("is no NAME=PATH, for example pirate=./pirate")


@pytest.mark.parametrize(
    "name", ["", "A", "-a", ".a", "a/b", "../a", "a b", "é", "a" * 64, "(base)"]
)
def test_a_bad_adapter_name_is_told_the_pattern(name: str) -> None:
    line = refusal(f"--adapter={name}=/x")
    assert line == f"--adapter: {name!r} is no adapter name: [a-z0-9][a-z0-9._-]{{0,62}}"


@pytest.mark.parametrize("name", ["a", "0", "a.b_c-d", "a" * 63])
def test_a_good_adapter_name_is_taken(name: str) -> None:
    assert Settings.from_argv(["--adapter", f"{name}=/x"]).adapter == {name: Path("/x")}


def test_places_of_sources_are_repeated_or_joined_by_commas() -> None:
    flag = FLAGS["adapter_source_allow"]
    for argv in ([flag, "/x", flag, "https://h/y"], [flag, "/x,https://h/y,"]):
        assert Settings.from_argv(argv).adapter_source_allow == ["/x", "https://h/y"]


@pytest.mark.parametrize("place", ["adapters", "nosuch://host/x", "https://u:p@host/x", "/a/../b"])
def test_a_place_that_no_source_can_be_below_is_refused(place: str) -> None:
    line = refusal(FLAGS["adapter_source_allow"], place)
    assert line.startswith("--adapter-source-allow: the allowed source ")
    assert "u:p" not in line


# --- addresses ---------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:0", "127.8.9.10:1", "[::1]:50051", "localhost:65535"),
        "[0:0:0:0:0:0:0:1]:50051",
    ],
)
def test_this_machine_alone_can_reach_a_loopback_address(address: str) -> None:
    assert is_loopback(address)
    assert Settings.from_argv(["--listen", address]).listen == address


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0:50051", "[::]:50051", "192.0.2.1:50051", "[2001:db8::1]:50051"),
        *("[fe80::1%eth0]:50051", "example.com:50051", "localhost.example.com:50051"),
        *("1270.0.0.1:50051", "[::ffff:192.0.2.1]:50051", "0:50051"),
    ],
)
def test_others_can_reach_any_other_address(address: str) -> None:
    assert not is_loopback(address)
    line = refusal("--listen", address)
    assert line.startswith(f"--listen {address} is open to others and has no TLS; ")
    assert "--tls-cert" in line and "--insecure" in line


@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen"])
@pytest.mark.parametrize(
    "address",
    [
        *("", "127.0.0.1", ":50051", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65536"),
        *("127.0.0.1:-1", "127.0.0.1:²", "127.0.0.1:٣"),
        *("::1:50051", "::1", "[::1]", "[::1:50051", "::1]:50051"),
        *("a..b:50051", "a" * 64 + ":50051", "unix:/tmp/x"),
    ],
)
def test_what_is_no_host_and_port_is_told_the_format(flag: str, address: str) -> None:
    """None of these can be listened on; gRPC would say so only when the model is loaded."""
    line = refusal(flag, address, "--insecure")
    assert line == (
        f"{flag}: {address!r} is no HOST:PORT, for example 127.0.0.1:50051 or [::1]:50051"
    )


@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen"])
@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "example.com:1", "[fe80::1%eth0]:1"])
def test_insecure_allows_an_address_that_others_reach(flag: str, address: str) -> None:
    settings = Settings.from_argv([flag, address, "--insecure"])
    assert address in (settings.listen, settings.metrics_listen)


def test_reflection_is_on_for_loopback_alone_unless_told() -> None:
    public = ["--listen", "0.0.0.0:1", "--insecure"]
    assert Settings.from_argv([]).reflection_on
    assert not Settings.from_argv(public).reflection_on
    assert Settings.from_argv([*public, "--reflection"]).reflection_on
    assert not Settings.from_argv(["--no-reflection"]).reflection_on


# --- contradictions ----------------------------------------------------------


def test_tls_opens_a_public_address(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue(tmp_path, "server")
    settings = Settings.from_argv(
        ["--listen", "0.0.0.0:1", "--tls-cert", str(cert), "--tls-key", str(key)]
    )
    assert (settings.tls_cert, settings.tls_key) == (cert, key)


def test_tls_of_grpc_does_not_open_the_metrics(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue(tmp_path, "server")
    tls = ["--tls-cert", str(cert), "--tls-key", str(key)]
    line = refusal(*tls, "--metrics-listen", "0.0.0.0:1")
    assert line.startswith("--metrics-listen 0.0.0.0:1 is open to others") and "--insecure" in line


@pytest.mark.parametrize("flag", ["--tls-cert", "--tls-key"])
def test_half_a_certificate_is_refused(flag: str, authority: Authority) -> None:
    line = refusal(flag, str(authority.path))
    assert line == "--tls-cert and --tls-key belong together; give both or none"


def test_a_client_ca_without_a_certificate_is_refused(authority: Authority) -> None:
    line = refusal("--tls-client-ca", str(authority.path))
    assert line == "--tls-client-ca needs --tls-cert and --tls-key"


@pytest.mark.parametrize("flag", ["--tls-cert", "--tls-key", "--tls-client-ca"])
def test_a_tls_file_that_is_not_there_is_named(
    flag: str, authority: Authority, tmp_path: Path
) -> None:
    files = tls_files(authority, tmp_path) | {flag: tmp_path / "nowhere.pem"}
    line = refusal(*(str(part) for pair in files.items() for part in pair))
    assert line == f"{flag} {tmp_path / 'nowhere.pem'} is no file"


def tls_files(authority: Authority, folder: Path) -> dict[str, Path]:
    """The three TLS flags, with files that go together."""
    cert, key = authority.issue(folder, "server")
    return {"--tls-cert": cert, "--tls-key": key, "--tls-client-ca": authority.path}


@pytest.mark.parametrize("flag", ["--tls-cert", "--tls-key", "--tls-client-ca"])
def test_a_tls_file_that_holds_none_is_named(
    flag: str, authority: Authority, tmp_path: Path
) -> None:
    """gRPC would say that it cannot bind the address, when the model is loaded."""
    files = tls_files(authority, tmp_path)
    files[flag].write_text("no certificate and no key")
    line = refusal(*(str(part) for pair in files.items() for part in pair))
    assert f"{flag} {files[flag]}" in line and "PEM" in line


def test_a_key_of_another_certificate_is_refused(authority: Authority, tmp_path: Path) -> None:
    files = tls_files(authority, tmp_path)
    _, files["--tls-key"] = authority.issue(tmp_path, "other")
    line = refusal(*(str(part) for pair in files.items() for part in pair))
    assert f"--tls-key {files['--tls-key']}" in line and "--tls-cert" in line


def test_a_key_with_a_password_is_refused_without_asking_for_it(
    authority: Authority, tmp_path: Path
) -> None:
    files = tls_files(authority, tmp_path)
    key = serialization.load_pem_private_key(files["--tls-key"].read_bytes(), password=None)
    files["--tls-key"].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    line = refusal(*(str(part) for pair in files.items() for part in pair))
    assert f"--tls-key {files['--tls-key']}" in line and "password" in line


def test_fewer_adapters_in_memory_than_in_a_batch_are_refused() -> None:
    line = refusal("--max-loras", "8", "--max-cpu-loras", "7")
    assert line == "--max-cpu-loras must be at least --max-loras"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("dtype", "int8"), ("workers", "0"), ("workers", "33"), ("workers", "two")),
        *(("max_model_len", "15"), ("max_num_seqs", "0"), ("gpu_memory_utilization", "0")),
        *(("gpu_memory_utilization", "1.1"), ("max_loras", "0"), ("max_lora_rank", "7")),
        *(("default_max_tokens", "0"), ("default_temperature", "2.1")),
        *(("default_temperature", "nan"), ("default_unary_deadline_s", "0")),
        *(("default_stream_deadline_s", "-1"), ("drain_grace_s", "-1"), ("drain_delay_s", "nan")),
    ],
)
def test_a_value_out_of_range_is_named_by_its_flag(field: str, value: str) -> None:
    assert refusal(FLAGS[field], value).startswith(f"{FLAGS[field]}: Input should be ")


def test_all_wrong_flags_are_named_at_once() -> None:
    line = refusal("--workers", "0", "--dtype", "int8", "--adapter", "x")
    assert all(f"{flag}: " in line for flag in ("--workers", "--dtype", "--adapter"))
