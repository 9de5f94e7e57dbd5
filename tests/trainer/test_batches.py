from __future__ import annotations

from pathlib import Path

from tests.trainer.training_run import write_rows
from trainer.batches import Rows, load_rows, trained_tokens
from trainer.recipe import rows_sha256
from trainer.reference import MAX_ROW_TOKENS
from trainer.reference_scoring import window
from trainer.rows import IGNORED


def load(rows: Path, tmp_path: Path, *, fraction: float = 0.25, seed: int = 1) -> Rows:
    return load_rows(rows, None, eval_fraction=fraction, seed=seed, cache=tmp_path / "cache")


def ids(rows: object) -> list[tuple[int, ...]]:
    return [tuple(row["input_ids"]) for row in rows]  # type: ignore[attr-defined]


def test_a_split_is_of_all_rows_and_the_same_for_a_seed(rows: Path, tmp_path: Path) -> None:
    one, again, other = (load(rows, tmp_path, seed=seed) for seed in (1, 1, 2))
    whole = load(rows, tmp_path, fraction=0.0)
    assert whole.held_out is None and one.held_out is not None
    assert (len(one.train), len(one.held_out)) == (18, 6)
    assert sorted(ids(one.train) + ids(one.held_out)) == sorted(ids(whole.train))
    assert ids(one.train) == ids(again.train) and ids(one.train) != ids(other.train)


def test_held_out_rows_of_another_dataset_leave_all_to_train_on(rows: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other", count=5)
    found = load_rows(rows, other, eval_fraction=0.5, seed=1, cache=tmp_path / "cache")
    assert found.held_out is not None
    assert (len(found.train), len(found.held_out)) == (24, 5)


def test_the_longest_come_first(rows: Path, tmp_path: Path) -> None:
    train = load(rows, tmp_path).train
    lengths = sorted((len(row) for row in ids(train)), reverse=True)
    assert [len(row) for row in ids(load(rows, tmp_path).longest(4))] == lengths[:4]
    assert len(load(rows, tmp_path).longest(100)) == 18


def test_the_digest_is_of_what_is_trained_on(rows: Path, tmp_path: Path) -> None:
    assert rows_sha256(load(rows, tmp_path)) == rows_sha256(load(rows, tmp_path))
    digests = {
        rows_sha256(load(rows, tmp_path)),
        rows_sha256(load(rows, tmp_path, seed=2)),
        rows_sha256(load(rows, tmp_path, fraction=0.0)),
        rows_sha256(load(write_rows(tmp_path / "other", seed=2), tmp_path, fraction=0.0)),
    }
    assert len(digests) == 4


def test_the_first_token_of_a_row_follows_nothing() -> None:
    assert trained_tokens([5, 6, IGNORED, 7]) == 2
    assert window([5, 6, 7], [5, IGNORED, 7]) == ([5, 6, 7], [2])
    assert window([5], [5]) == ([], [])


def test_long_rows_are_cut_to_where_something_is_trained() -> None:
    length = 3 * MAX_ROW_TOKENS
    token_ids = list(range(length))
    kept, positions = window(token_ids, token_ids)
    assert kept == token_ids[:MAX_ROW_TOKENS] and positions == list(range(1, MAX_ROW_TOKENS))
    late = [IGNORED] * (length - 2) + token_ids[-2:]
    kept, positions = window(token_ids, late)
    assert len(kept) <= MAX_ROW_TOKENS
    assert [kept[at] for at in positions] == token_ids[-2:]
