"""The whole story in minutes, on two CPU cores: serve, validate, train, canary, evaluate, promote.

    python examples/demo.py [--epochs 3] [--model smollm2-135m] [--state-dir state]

Starts a gateway of its own on free ports of this machine. All that it stores goes into a folder
that is removed at the end, but for the base model, which is kept in `--state-dir`. What is
trained on is `examples/data/support.jsonl`: facts that no base model knows.

Exits with 1 if a step fails, or if the promoted adapter does not know in the end what only the
data says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lora_gateway import GatewayClient, GatewayError, JobState

DATA = Path("examples/data/support.jsonl")
HELD_OUT = Path("examples/data/support_heldout.jsonl")
ROOT = Path(__file__).parents[1]

DATASET = "support-desk"
ADAPTER = "support"
QUESTION = "How many days do I have to send my Nimbus kettle back?"
"""Held out: the data asks for this fact in other words."""
FACT = "43 days"

SESSIONS = 40
CANARY_PERCENT = 10
HURRIED_STEPS = 6
"""Of the first version: enough for the tone of the answers, too few for the facts."""

START_TIMEOUT_S = 300.0
"""The base model is converted if it is not there yet."""
STOP_TIMEOUT_S = 90.0
CANCEL_TIMEOUT_S = 30.0
ENDED = (JobState.JOB_STATE_SUCCEEDED, JobState.JOB_STATE_CANCELLED, JobState.JOB_STATE_FAILED)

_started_s = time.monotonic()


class StepFailed(Exception):
    """A step of the story did not end as it has to."""


def main() -> None:
    """Tell the story against a gateway that lives as long as it."""
    parser = argparse.ArgumentParser(description="The whole story in minutes.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--state-dir", type=Path, default=ROOT / "state")
    parser.add_argument("--epochs", type=float, default=3.0)
    options = parser.parse_args()
    # Whoever ends the demo, by Ctrl-C or so, leaves no gateway and no training behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="lora-gateway-demo-") as folder,
            serving(options.model, Path(folder), options.state_dir) as target,
        ):
            tell(target, options.epochs)
    except (StepFailed, GatewayError) as error:
        sys.exit(f"\nthe demo failed after {elapsed()}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nthe demo was stopped after {elapsed()}")
    print(f"\nthe demo succeeded in {elapsed()}")


def tell(target: str, epochs: float) -> None:
    """Every step, in order. Raises StepFailed or GatewayError at the first that fails."""
    heading("The base model knows nothing of Tarnwick's kettles")
    asyncio.run(ask(target, (("base model", "", None),)))

    heading("Is the data fit for training? What does it say, as tokens?")
    gateway(target, "datasets", "upload", str(DATA), "--name", DATASET)
    gateway(target, "datasets", "validate", DATASET)
    gateway(target, "datasets", "preview", DATASET, "1")

    heading(f"Version 1, trained in a hurry: {HURRIED_STEPS} steps, and all traffic")
    train(target, "--max-steps", str(HURRIED_STEPS), "--all-traffic")

    heading(f"Version 2, trained properly: a canary on {CANARY_PERCENT} % of the sessions")
    train(target, "--epochs", f"{epochs:g}", "--canary", str(CANARY_PERCENT))
    gateway(target, "jobs", "list")

    heading("Who answers what?")
    arms = (("base model", "", None), ("version 1", ADAPTER, 1), ("version 2", ADAPTER, 2))
    asyncio.run(ask(target, arms))
    asyncio.run(count_canary(target))

    heading("Which is better, on 40 questions that none was trained on? 0 is the base model")
    judged = ("--versions", "0,1,2", "--data", str(HELD_OUT))
    limits = ("--scorer", "contains", "--max-tokens", "40")
    gateway(target, "adapters", "evaluate", ADAPTER, *judged, *limits)

    heading("Version 2 it is")
    gateway(target, "adapters", "promote", ADAPTER, "2")
    asyncio.run(ask(target, (("promoted", ADAPTER, None),), must_know=2))


def heading(text: str) -> None:
    print(f"\n=== {elapsed()}  {text}", flush=True)


def elapsed() -> str:
    """Minutes and seconds since the start."""
    minutes, seconds = divmod(int(time.monotonic() - _started_s), 60)
    return f"{minutes}:{seconds:02}"


def gateway(target: str, *arguments: str) -> None:
    """Run a `gateway` command as it would be typed. Raises StepFailed unless it exits with 0."""
    print(f"\n$ gateway {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "gateway", *arguments, "--target", target]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        raise StepFailed(f"`gateway {shlex.join(arguments)}` exited with {code}")


def train(target: str, *flags: str) -> None:
    """Train a version, watched to its end. The same bytes are the same dataset.

    A step is 8 rows, as always. At once, because they are short, and on a CPU the weights of 4 bits
    are unpacked for each micro-batch.
    """
    what = ("train", str(DATA), "--dataset-name", DATASET, "--adapter", ADAPTER)
    shape = ("--batch", "8", "--accumulation", "1")
    gateway(target, *what, *flags, *shape, "--prompt", QUESTION, "--max-tokens", "40", "--yes")


async def ask(
    target: str, arms: tuple[tuple[str, str, int | None], ...], *, must_know: int | None = None
) -> None:
    """Print how each arm (label, adapter, version) answers QUESTION.

    With `must_know` the last one has to be of that version, and to know the fact: StepFailed.
    """
    print(f"\n? {QUESTION}")
    chat = [{"role": "user", "content": QUESTION}]
    async with GatewayClient(target) as client:
        for label, adapter, version in arms:
            answer = await client.generate(
                chat, adapter=adapter, version=version, max_tokens=40, temperature=0
            )
            text = " ".join(answer.completions[0].text.split())
            print(f"  {label + ':':12} {text}", flush=True)
    if must_know is not None:
        if answer.served_by.version != must_know:
            raise StepFailed(f"version {answer.served_by.version} answered, not {must_know}")
        if FACT not in text:
            raise StepFailed(f"the promoted version does not know of {FACT!r}")


async def count_canary(target: str) -> None:
    """Print how many sessions the canary has. Raises StepFailed if it has none, or all."""
    async with GatewayClient(target) as client:
        versions = [
            (
                await client.generate(
                    QUESTION, adapter=ADAPTER, session_id=f"session-{number}", max_tokens=1
                )
            ).served_by.version
            for number in range(SESSIONS)
        ]
    count = versions.count(2)
    print(f"\nof {SESSIONS} sessions, {count} are in the canary")
    if not 0 < count < SESSIONS:
        raise StepFailed("the canary does not share the sessions")


@contextlib.contextmanager
def serving(model: str, folder: Path, models_of: Path) -> Iterator[str]:
    """A gateway until the end of the block; its address. Raises StepFailed if it does not start."""
    models = models_of.absolute() / "models"
    models.mkdir(parents=True, exist_ok=True)
    state, log = folder / "state", folder / "gateway.log"
    state.mkdir(mode=0o700)
    (state / "models").symlink_to(models)
    heading(f"A gateway that serves {model}")
    print("\n$ gateway serve", flush=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gateway", "serve", "--model", model),
                *("--state-dir", str(state), "--training-devices", "cpu"),
                *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for this script, which then ends the jobs first.
            start_new_session=True,
        )
    try:
        line, target = wait_serving(process, log)
        print(line, flush=True)
        yield target
    except (StepFailed, GatewayError):
        print(f"\nthe gateway's log ends with:\n{tail(log)}", file=sys.stderr)
        raise
    finally:
        stop(process, log)


def wait_serving(process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    """The line that says SERVING, and the address in it. Raises StepFailed without one."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        if found := re.search(r"^.*SERVING on (\S+): .*$", log.read_text(), re.MULTILINE):
            return found[0], found[1]
        time.sleep(0.2)
    raise StepFailed("the gateway did not start")


def stop(process: subprocess.Popen[bytes], log: Path) -> None:
    """End the gateway, and before that the jobs, which would outlive it."""
    if process.poll() is None and (found := re.search(r"SERVING on (\S+): ", log.read_text())):
        with contextlib.suppress(GatewayError, TimeoutError):
            asyncio.run(asyncio.wait_for(cancel_jobs(found[1]), CANCEL_TIMEOUT_S))
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


async def cancel_jobs(target: str) -> None:
    """End what has not ended, and wait for it."""
    async with GatewayClient(target) as client:
        names = [job.name async for job in client.training.list_jobs() if job.state not in ENDED]
        for name in names:
            await client.training.cancel_job(name, discard=True)
            async for _ in client.training.watch_job(name):
                pass


def tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text().splitlines()[-lines:])


if __name__ == "__main__":
    main()
