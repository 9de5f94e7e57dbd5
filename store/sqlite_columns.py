"""Values that one column of the SQLite registry holds as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from store.records import Arm, Guard


def arms_to_column(arms: Iterable[Arm]) -> str:
    """A split, as pairs of version and weight."""
    return _dumps([[arm.version, arm.weight] for arm in arms])


def arms_from_column(column: str) -> tuple[Arm, ...]:
    """What `arms_to_column` wrote."""
    return tuple(Arm(version, weight) for version, weight in json.loads(column))


def guard_to_column(guard: Guard | None) -> str | None:
    """A guard by its fields."""
    return None if guard is None else _dumps(asdict(guard))


def guard_from_column(column: str | None) -> Guard | None:
    """What `guard_to_column` wrote."""
    return None if column is None else Guard(**json.loads(column))


def texts_to_column(texts: Iterable[str]) -> str:
    """Texts in their order."""
    return _dumps(list(texts))


def texts_from_column(column: str) -> tuple[str, ...]:
    """What `texts_to_column` wrote."""
    return tuple(json.loads(column))


def mapping_to_column(mapping: Mapping[str, str]) -> str:
    """Texts by name."""
    return _dumps(dict(mapping))


def mapping_from_column(column: str) -> dict[str, str]:
    """What `mapping_to_column` wrote."""
    mapping: dict[str, str] = json.loads(column)
    return mapping


def json_to_column(value: object) -> str:
    """What JSON can say, NaN and infinity too. Equal values have equal texts."""
    return json.dumps(_plain(value), separators=(",", ":"), sort_keys=True)


def json_from_column(column: str) -> Any:
    """What `json_to_column` wrote, with lists for all sequences."""
    return json.loads(column)


def storable(text: str) -> str:
    r"""The text with what is no Unicode spelled out, as `\ud800`.

    A finding may quote an adapter's JSON or the name of a file, and both can hold lone
    surrogates, which neither SQLite nor protobuf takes.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def _plain(value: object) -> object:
    match value:
        case str():
            return storable(value)
        case Mapping():
            return {storable(str(key)): _plain(item) for key, item in value.items()}
        case Sequence():
            return [_plain(item) for item in value]
    return value


def _dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
