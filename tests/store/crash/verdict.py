"""What has to hold of a state folder after a crash, and what did not."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from store.artifacts import ArtifactDamaged
from store.records import NewVersion, RegistryError, VersionRecord
from store.state_folder import StateFolderUnusable
from tests.store.crash.host import Host
from tests.store.crash.observation import Observation, contradictions, observe
from tests.store.crash.script import REQUESTS, Script, run_script


@dataclass(frozen=True, slots=True)
class Expectation:
    """A script's run that nothing interrupts."""

    script: Script
    results: tuple[object, ...]
    """What each operation answers."""
    states: tuple[Observation, ...]
    """What there is after each operation."""


async def expect(script: Script, watched: Path, sources: Path) -> Expectation:
    """Run a script in an empty folder."""
    await script.prepare(watched, sources)
    host = Host(watched, sources)
    results: list[object] = []
    states: list[Observation] = []

    async def look(index: int, result: object) -> None:
        results.append(result)
        closed = index == len(script.operations) - 1
        states.append(states[-1] if closed else await observe(host, REQUESTS))

    await run_script(script, host, look)
    return Expectation(script, tuple(results), tuple(states))


async def judge(
    watched: Path, sources: Path, expected: Expectation, acknowledged: Sequence[str]
) -> list[str]:
    """What is wrong with the folder, after a run acknowledged these; empty: nothing is.

    Opens the folder, and goes on in it as a gateway would that was started again.
    """
    told = [f"{index} {result!r}" for index, result in enumerate(expected.results)]
    if list(acknowledged) != told[: len(acknowledged)]:
        return [f"acknowledged {acknowledged}, and not {told[: len(acknowledged)]}"]
    host = Host(watched, sources)
    try:
        await host.open()
        return [
            *_misplaced(await observe(host, REQUESTS), expected, len(acknowledged)),
            *_damaged(host),
            *await _reused(host, expected.results[: len(acknowledged)]),
        ]
    except (RegistryError, sqlite3.Error, StateFolderUnusable, OSError) as error:
        return [f"cannot be used: {error}"]
    finally:
        await host.close()


def _misplaced(seen: Observation, expected: Expectation, acknowledged: int) -> list[str]:
    """Is this what it was after the last operation acknowledged, or after one more?"""
    wrong = contradictions(seen)
    possible = expected.states[max(acknowledged - 1, 0) : acknowledged + 1]
    if seen not in possible:
        names = [operation.name for operation in expected.script.operations]
        last = names[acknowledged - 1] if acknowledged else "nothing"
        at = [name for name, state in zip(names, expected.states, strict=True) if state == seen]
        found = f"it is as after {at[0]!r}" if at else f"half an operation is there: {seen}"
        wrong.append(f"{last!r} was acknowledged, and {found}")
    return wrong


def _damaged(host: Host) -> list[str]:
    wrong = []
    for path in (host.state_path / "adapters").iterdir():
        try:
            host.artifacts.verify(path.name)
        except (ArtifactDamaged, ValueError) as error:
            wrong.append(str(error))
    left = list((host.state_path / "staging").iterdir())
    return [*wrong, *(f"{path.name} was not swept" for path in left)]


async def _reused(host: Host, results: Sequence[object]) -> list[str]:
    """Does the next version get a number, or an id, that somebody was told before?"""
    new = NewVersion("acme", "pirate", "file:///adapters/next")
    fresh = await host.registry.begin_version(new, request_id="next", actor="cli")
    wrong = contradictions(await observe(host, REQUESTS))
    for result in results:
        for told in result if isinstance(result, tuple) else (result,):
            match told:
                case VersionRecord(tenant="acme", version=fresh.version):
                    wrong.append(f"version {fresh.version} is used again")
                case VersionRecord(lora_int_id=fresh.lora_int_id) | fresh.lora_int_id:
                    wrong.append(f"lora_int_id {fresh.lora_int_id} is used again")
    return wrong
