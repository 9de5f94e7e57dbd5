"""Settings of `gateway serve`: flags, `GATEWAY_*` variables, defaults, and what they mean.

The one file that touches the process environment: `Settings.from_argv` reads it,
`prepare_environment` writes what the libraries below want to find there, and hands on what it
found to `training_environment_base`.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, CliApp, NoDecode, SettingsConfigDict

from engine import processors
from engine.sampling import MAX_N
from gateway.address import Address, is_loopback
from gateway.device_names import AUTO, NO_DEVICE, checked
from gateway.tls_files import check_tls
from gateway.worker_count import MAX_WORKERS, default_workers
from store.records import NAME
from store.sources import AllowedSources


class SettingsError(Exception):
    """The settings contradict themselves or each other. One line per finding."""


VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"

PRICE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ([A-Z]{3})")
"""An amount and the three letters of a currency."""


class Settings(BaseSettings):
    """Everything that `gateway serve` can be told."""

    model_config = SettingsConfigDict(
        env_prefix="GATEWAY_",
        frozen=True,
        extra="forbid",
        cli_prog_name="gateway serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    model: str = Field(
        "smollm2-135m", description="Built-in name (tiny, smollm2-135m), folder, or hub id."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of weights and computation; auto takes the model's."
    )
    quantization: str | None = Field(None, description="vLLM quantization method.")

    listen: Address = Field("127.0.0.1:50051", description="Public gRPC address.")
    metrics_listen: Address = Field("127.0.0.1:9464", description="Metrics and status page (HTTP).")
    insecure: bool = Field(False, description="Allow a non-loopback address without TLS.")
    tls_cert: Path | None = Field(None, description="Server certificate chain, PEM.")
    tls_key: Path | None = Field(None, description="Server private key, PEM.")
    tls_client_ca: Path | None = Field(None, description="CA of clients, PEM; makes TLS mutual.")
    reflection: bool | None = Field(
        None, description="gRPC reflection. Default: on for loopback, else off."
    )

    state_dir: Path = Field(Path("state"), description="State folder; one gateway at a time.")
    adapter: Annotated[dict[str, Path], NoDecode] = Field(
        default_factory=dict, description="NAME=PATH of an adapter to serve; repeatable."
    )
    adapter_source_allow: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="Path or URL prefix that source_uri may name; repeatable. Uploads always work.",
    )

    shards: int = Field(
        1, ge=1, le=64, description="Engines, each with the base model and adapters of its own."
    )
    devices_per_shard: int = Field(
        1, ge=1, le=64, description="GPUs of one engine (tensor parallel); 1 on a CPU."
    )
    workers: int | None = Field(
        None, ge=1, le=MAX_WORKERS, description="Serving processes. Default: by shards, processors."
    )
    max_model_len: int = Field(2048, ge=16, description="Context in tokens, prompt and answer.")
    max_num_seqs: int = Field(256, ge=1, le=4096, description="Completions run at once.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share that vLLM may take.")
    cpu_kv_cache_gib: int = Field(
        1, ge=1, description="KV cache of each CPU engine, in GiB; ignored on GPUs."
    )
    max_loras: int = Field(8, ge=1, le=256, description="Different adapters in one batch.")
    max_cpu_loras: int = Field(64, ge=1, description="Adapters an engine keeps in memory.")
    max_lora_rank: Literal["1", "8", "16", "32", "64", "128", "256", "320", "512"] = Field(
        "32", description="Highest rank an adapter may have."
    )
    adapter_loader: Literal["vllm", "staged"] = Field(
        "vllm", description="Who reads adapters: vLLM between steps, or a thread (staged)."
    )

    engine_stall_timeout_s: float = Field(
        30.0, ge=1, le=3600, description="An engine that does not answer for so long is killed."
    )
    worker_stall_timeout_s: float = Field(
        30.0, ge=15, description="A worker that does not answer for so long is killed."
    )

    training_devices: Annotated[list[str], NoDecode, AfterValidator(checked)] = Field(
        default_factory=lambda: [AUTO],
        description="cpu, or numbers of GPUs, that train; repeatable. none turns training off; "
        "auto takes the cpu where the engine runs on it.",
    )
    training_python: Path | None = Field(
        None, description="Interpreter of training processes. Default: this one."
    )
    training_stall_timeout_s: float = Field(
        300, gt=0, description="A training process that does not get on for so long is replaced."
    )
    lend_shards: Literal["never", "spare", "always"] = Field(
        "never",
        description="Whether a shard lends its device to a job: only while another one serves "
        "(spare), or even if calls are refused meanwhile (always).",
    )
    lend_limit_s: float | None = Field(
        None, ge=1, description="Longest that a shard is lent at once; then the job saves."
    )
    lend_rest_s: float = Field(
        60.0, ge=0, description="Seconds that a shard serves before it is lent again."
    )
    training_price: str | None = Field(
        None, description="Price of a device hour for estimates, for example '2.50 EUR'."
    )

    default_max_tokens: int = Field(
        512, ge=1, description="max_tokens when a request sets none; cut to the context."
    )
    default_temperature: float = Field(
        0.7, ge=0, le=2, description="temperature when a request sets none."
    )
    default_unary_deadline_s: float = Field(
        30.0, gt=0, description="Deadline of a unary call without one, in seconds."
    )
    default_stream_deadline_s: float = Field(
        300.0, gt=0, description="Deadline of a streaming call without one, in seconds."
    )

    drain_delay_s: float = Field(
        0.0, ge=0, description="Seconds between NOT_SERVING and refusing new calls on SIGTERM."
    )
    drain_grace_s: float = Field(
        30.0, ge=0, description="Seconds that running calls get to finish on SIGTERM."
    )
    otlp_endpoint: str | None = Field(
        None, description="OTLP/gRPC collector for traces, for example http://127.0.0.1:4317."
    )

    @field_validator("adapter", mode="before")
    @classmethod
    def _parse_adapters(cls, value: object) -> object:
        """`NAME=PATH` entries: a list from flags, comma-separated from the environment."""
        if isinstance(value, str):
            value = [entry for entry in value.split(",") if entry]
        if not isinstance(value, list):
            return value
        adapters: dict[str, str] = {}
        for entry in (part for item in value for part in str(item).split(",") if part):
            name, equals, path = entry.partition("=")
            if not equals or not path:
                raise ValueError(f"{entry!r} is no NAME=PATH, for example pirate=./pirate")
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no adapter name: {NAME.pattern}")
            if name in adapters:
                raise ValueError(f"adapter {name!r} is given twice; give each name once")
            adapters[name] = path
        return adapters

    @field_validator("training_devices", "adapter_source_allow", mode="before")
    @classmethod
    def _parse_list(cls, value: object) -> object:
        """A list from flags, comma-separated from the environment."""
        entries = value if isinstance(value, list) else [value]
        return [part for entry in entries for part in str(entry).split(",") if part]

    @field_validator("training_price")
    @classmethod
    def _check_price(cls, value: str | None) -> str | None:
        if value is not None and not PRICE.fullmatch(value):
            raise ValueError(f"{value!r} is no amount with a currency, for example '2.50 EUR'")
        return value

    @field_validator("adapter_source_allow")
    @classmethod
    def _check_sources(cls, value: list[str]) -> list[str]:
        AllowedSources(value)  # raises ValueError for what is neither path nor URL
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together; give both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        for flag, path in (
            ("--tls-cert", self.tls_cert),
            ("--tls-key", self.tls_key),
            ("--tls-client-ca", self.tls_client_ca),
        ):
            if path is not None and not path.is_file():
                raise ValueError(f"{flag} {path} is no file")
        if self.tls_cert is not None and self.tls_key is not None:
            check_tls(self.tls_cert, self.tls_key, self.tls_client_ca)
        if not self.insecure and not is_loopback(self.metrics_listen):
            raise ValueError(
                f"--metrics-listen {self.metrics_listen} is open to others and has no TLS; give "
                "--insecure if something in front encrypts"
            )
        if self.tls_cert is None and not self.insecure and not is_loopback(self.listen):
            raise ValueError(
                f"--listen {self.listen} is open to others and has no TLS; give --tls-cert and "
                "--tls-key, or --insecure if something in front encrypts"
            )
        if self.training_python is not None and not self.training_python.is_file():
            raise ValueError(f"--training-python {self.training_python} is no file")
        if self.max_cpu_loras < self.max_loras:
            raise ValueError("--max-cpu-loras must be at least --max-loras")
        if _engine_runs_on_cpu():
            if self.devices_per_shard != 1:
                raise ValueError("--devices-per-shard is for GPUs; a CPU engine is one device")
            if self.shards > 1:
                processors.shares(self.shards)
        elif (gpus := len(_visible_gpus(needed := self.shards * self.devices_per_shard))) < needed:
            raise ValueError(
                f"--shards {self.shards} with --devices-per-shard {self.devices_per_shard} needs "
                f"{needed} GPUs, and {VISIBLE_GPUS} names {gpus}: name more there"
            )
        return self

    @property
    def shard_names(self) -> list[str]:
        """Of all shards. Adapters are placed by them, so they stay the same from start to start."""
        return [f"shard-{number}" for number in range(self.shards)]

    @property
    def worker_count(self) -> int:
        """Processes that serve the public address: as told, else by shards and processors."""
        return self.workers or default_workers(self.shards, len(self.gpus(0)), processors.usable())

    def gpus(self, shard: int) -> list[str]:
        """The GPUs of a shard, by its number: of those that this process may see, in their order;
        none if the engine runs on the CPU."""
        if _engine_runs_on_cpu():
            return []
        count = self.devices_per_shard
        return _visible_gpus(self.shards * count)[shard * count :][:count]

    @contextlib.contextmanager
    def environment_of(self, shard: int) -> Iterator[None]:
        """A core that is started inside runs on its own GPUs, or share of the processors.

        vLLM takes processors from the environment alone. One shard on a CPU has what vLLM chooses,
        or what the operator has set. GPUs are named there too, and not by `device_ids`: what is
        compiled on the first GPU is cached for all engines, and fails on any other unless each
        engine sees its own as the first ("invalid argument", seen on two H200).
        """
        if gpus := self.gpus(shard):
            name, value = VISIBLE_GPUS, ",".join(gpus)
        elif self.shards > 1:
            name = "VLLM_CPU_OMP_THREADS_BIND"
            value = ",".join(map(str, processors.shares(self.shards)[shard]))
        else:
            yield
            return
        before = os.environ.get(name)
        os.environ[name] = value
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before

    @property
    def devices_that_train(self) -> list[str]:
        """As told; by itself the CPU if the engine runs on it: a GPU is the engine's alone. Those
        of the last shard, if it is to lend them."""
        if self.training_devices == [AUTO]:
            lent = self.gpus(self.shards - 1) if self.lends else []
            return ["cpu"] if _engine_runs_on_cpu() else lent
        return [device for device in self.training_devices if device != NO_DEVICE]

    @property
    def lends(self) -> bool:
        """Whether shards lend devices."""
        return self.lend_shards != "never"

    @property
    def python_that_trains(self) -> str:
        """As told, else this one."""
        return str(self.training_python or sys.executable)

    @property
    def reflection_on(self) -> bool:
        """Whether to offer reflection: as told, else on loopback only."""
        return is_loopback(self.listen) if self.reflection is None else self.reflection

    @classmethod
    def from_argv(cls, argv: Sequence[str]) -> Settings:
        """Settings from flags, then environment, then defaults.

        Raises SettingsError naming each flag that is wrong. Exits for `--help`, and for an
        unknown flag, as argparse does.
        """
        try:
            return CliApp.run(cls, cli_args=list(argv))
        except ValidationError as error:
            raise SettingsError(
                "; ".join(_finding(list(e["loc"]), e["msg"]) for e in error.errors())
            ) from None


def _finding(location: Sequence[object], message: str) -> str:
    flag = "--" + str(location[0]).replace("_", "-") + ": " if location else ""
    return flag + message.removeprefix("Value error, ")


def prepare_environment(settings: Settings, run_dir: Path) -> dict[str, str]:
    """Set what vLLM, transformers and prometheus_client read from the environment.

    Called once in the host, before any of them is imported; its children inherit it. What
    an operator has set stays, but for what correctness needs, and for what must go with the run
    folder `run_dir`. Returns the environment as it was.
    """
    found = dict(os.environ)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(run_dir)
    # Sockets, some 130 for each core; vLLM leaves them where a process is killed.
    os.environ["VLLM_RPC_BASE_PATH"] = str(run_dir)
    # The default is fork, which is not safe beside grpc's threads (ADR 0002).
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    for name, value in {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_kv_cache_gib),
        "VLLM_MAX_N_SEQUENCES": str(MAX_N),
        # Of a core that runs already. It greets at once, or died just now and never will.
        "VLLM_ENGINE_READY_TIMEOUT_S": "10",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        # Notes of torch and of third parties' code, once per process: not for operators.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }.items():
        os.environ.setdefault(name, value)
    if _engine_runs_on_cpu():
        # With LoRA vLLM compiles no model on a CPU, but a few helpers, each for seconds, and
        # some of them when the first caller asks for log probabilities (24 s seen).
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ["PATH"] = _path_from(sys.executable, found)
    return found


def training_environment_base(settings: Settings, found: Mapping[str, str]) -> dict[str, str]:
    """What training processes inherit: what `prepare_environment` found, but for the engine's.

    Not what it has set, nor what vLLM sets when it is imported: those are for an engine, which
    may be of another device and another interpreter. With TORCHDYNAMO_DISABLE of an engine on
    the CPU, training on a GPU would compile nothing.
    """
    own = ("PROMETHEUS_MULTIPROC_DIR", "VLLM_")
    kept = {name: value for name, value in found.items() if not name.startswith(own)}
    return {**kept, "PATH": _path_from(settings.python_that_trains, found)}


def _path_from(python: str, found: Mapping[str, str]) -> str:
    """Plain `python` on a console script's path finds ninja and others beside it."""
    return f"{Path(python).parent}{os.pathsep}{found.get('PATH', '')}"


def _visible_gpus(count: int) -> list[str]:
    """The first GPUs that this process may see, at most so many; all that there may be if it is
    not told."""
    if (visible := os.environ.get(VISIBLE_GPUS)) is None:
        return [str(gpu) for gpu in range(count)]
    return [gpu.strip() for gpu in visible.split(",") if gpu.strip()][:count]


def _engine_runs_on_cpu() -> bool:
    """Whether the CPU build of vLLM is the one that is installed."""
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True
