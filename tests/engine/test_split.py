"""A split keeps its weights, its keys stay where they are, and every process picks alike."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.split import Split
from store.records import Arm

KEYS = [f"session-{number}" for number in range(20_000)]
SIGMAS = 4.5
"""The keys are fixed, so a test that passes once passes always; a bias would be far outside."""

arms = st.lists(
    st.builds(Arm, version=st.integers(1, 2**32 - 1), weight=st.integers(1, 1_000_000)),
    min_size=1,
    max_size=16,
    unique_by=lambda arm: arm.version,
)
keys = st.text(max_size=128)


def split(*weights: int) -> Split:
    """A split over versions 1, 2, ... of these weights."""
    return Split([Arm(number, weight) for number, weight in enumerate(weights, start=1)])


def picks(of: Split) -> list[int | None]:
    return [of.pick(key) for key in KEYS]


def is_share(count: int, share: float) -> bool:
    """Whether `count` of the keys is `share` of them, but for chance."""
    deviation = math.sqrt(len(KEYS) * share * (1 - share))
    return abs(count - len(KEYS) * share) <= SIGMAS * deviation


def test_an_empty_split_picks_none() -> None:
    assert Split([]).arms == ()
    assert Split([]).pick("anyone") is None


@given(keys, st.integers(1, 1_000_000))
def test_a_single_arm_takes_every_key(key: str, weight: int) -> None:
    assert Split([Arm(7, weight)]).pick(key) == 7


def test_the_arms_are_kept_as_they_were_given() -> None:
    given_arms = [Arm(3, 90), Arm(1, 10)]
    of = Split(given_arms)
    given_arms.clear()
    assert of.arms == (Arm(3, 90), Arm(1, 10)), "a later change of the list is not seen"


@pytest.mark.parametrize(
    "weights",
    [(1, 1), (90, 10), (99, 1), (5, 3, 2), (1,) * 16, (1_000_000, 250_000)],
    ids=str,
)
def test_each_arm_gets_its_weights_share(weights: tuple[int, ...]) -> None:
    counts = Counter(picks(split(*weights)))
    for version, weight in enumerate(weights, start=1):
        assert is_share(counts[version], weight / sum(weights)), (version, counts)


def test_only_the_ratio_of_weights_counts() -> None:
    assert picks(split(9, 1)) == picks(split(90, 10)) == picks(split(900_000, 100_000))


@given(arms, keys)
def test_the_pick_is_an_arm_and_always_the_same(arms: list[Arm], key: str) -> None:
    picked = Split(arms).pick(key)
    assert picked in {arm.version for arm in arms}
    assert Split(arms).pick(key) == picked


@given(arms, keys, st.randoms(use_true_random=False))
def test_the_order_of_arms_does_not_matter(
    arms: list[Arm], key: str, shuffler: random.Random
) -> None:
    shuffled = list(arms)
    shuffler.shuffle(shuffled)
    assert Split(shuffled).pick(key) == Split(arms).pick(key)


def test_no_order_of_three_arms_moves_a_key() -> None:
    orders = permutations([Arm(1, 5), Arm(2, 3), Arm(3, 2)])
    assert len({tuple(picks(Split(order))) for order in orders}) == 1


def test_a_change_of_weights_moves_only_the_difference() -> None:
    before, after = picks(split(90, 10)), picks(split(80, 20))
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {(1, 2)}, "a key moves to the arm that grew, none the other way"
    assert is_share(len(moved), 0.10)


@given(arms, keys, st.data())
def test_a_key_leaves_its_arm_only_for_one_that_grew(
    arms: list[Arm], key: str, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(arms) - 1))
    grown = Arm(arms[index].version, data.draw(st.integers(arms[index].weight, 1_000_000)))
    old = Split(arms).pick(key)
    new = Split([*arms[:index], grown, *arms[index + 1 :]]).pick(key)
    assert new in (old, grown.version)


@given(arms, keys, st.data())
def test_an_arm_that_leaves_moves_only_its_own_keys(
    arms: list[Arm], key: str, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(arms))
    old = Split(arms).pick(key)
    new = Split([arm for arm in arms if arm != gone]).pick(key)
    if len(arms) == 1:
        assert new is None
    else:
        assert (new == old) == (old != gone.version)


def test_keys_of_an_arm_that_left_are_shared_by_weight() -> None:
    orphans = [key for key in KEYS if split(20, 60, 20).pick(key) == 2]
    heirs = Counter(Split([Arm(1, 20), Arm(3, 20)]).pick(key) for key in orphans)
    assert abs(heirs[1] - heirs[3]) <= 2 * SIGMAS * math.sqrt(len(orphans) / 4)


def test_splits_of_other_versions_are_independent() -> None:
    """Else the same callers would be the ones that every experiment is tried on."""
    first, second = picks(split(50, 50)), picks(Split([Arm(3, 50), Arm(4, 50)]))
    both = sum(old == 2 and new == 4 for old, new in zip(first, second, strict=True))
    assert is_share(both, 0.25)


@pytest.mark.parametrize(
    "key",
    ["", "ü", "\N{GRINNING FACE}", "a\0b", "x" * 100_000],
    ids=["empty", "umlaut", "astral", "NUL", "long"],
)
def test_any_text_is_a_key(key: str) -> None:
    assert split(1, 1, 1).pick(key) in (1, 2, 3)


def picks_elsewhere(some: Sequence[str], hash_seed: str) -> str:
    """What another process picks, whose own `hash` is seeded otherwise."""
    program = (
        "import sys; from engine.split import Split; from store.records import Arm; "
        "of = Split([Arm(1, 5), Arm(2, 3), Arm(3, 2)]); "
        "print(*(of.pick(key) for key in sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *some],
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip()


def test_every_process_picks_alike() -> None:
    """Workers, and the same worker after a restart, must agree."""
    some = KEYS[:200]
    here = " ".join(str(split(5, 3, 2).pick(key)) for key in some)
    assert picks_elsewhere(some, "1") == picks_elsewhere(some, "2") == here


def test_picks_are_those_of_earlier_releases() -> None:
    """Callers would change their arm with an upgrade if these did."""
    picked = "".join(str(split(5, 3, 2).pick(key)) for key in KEYS[:40])
    assert picked == "1112222321121212213211212121312131111121"
