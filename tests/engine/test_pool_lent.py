"""A pool some of whose shards are lent, or about to be."""

from __future__ import annotations

import pytest

from engine.generation import VersionKey
from engine.ring import NoShardOpen, ShardLent
from tests.engine.test_pool import three_shards


def test_a_shard_that_is_about_to_be_lent_takes_requests_until_it_is() -> None:
    several = three_shards()
    several.drain([], lent=["shard-0"])
    assert several.stays_open and several.lent == {"shard-0"}
    several.drain([], lent=several.ring.shards)
    assert several.is_open and not several.stays_open
    assert several.route_to(None).shard.name in several.ring.shards


def test_where_all_are_lent_that_is_said() -> None:
    several = three_shards()
    several.drain(several.ring.shards, lent=["shard-1"])
    several.leave("shard-1")
    with pytest.raises(ShardLent) as lent:
        several.route_to(VersionKey("acme", "beta", 2))
    assert lent.value.shard == "shard-1"
    with pytest.raises(ShardLent):
        several.homes(VersionKey("acme", "beta", 2))
    several.leave("shard-2")  # dead: another core comes soon
    with pytest.raises(NoShardOpen) as none_open:
        several.route_to(None)
    assert not isinstance(none_open.value, ShardLent)
