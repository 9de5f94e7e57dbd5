"""A name and a version become a route, or an error that names what is served."""

from __future__ import annotations

import contextlib

import pytest

from engine.errors import AdapterNotFound, VersionNotFound
from engine.fake import FakeShard
from engine.generation import GenerationRequest, ServedVersion
from engine.pool import ServedAdapter, ServedView, ShardPool


def version(adapter: str, number: int) -> ServedVersion:
    return ServedVersion("acme", adapter, number, number, f"/{adapter}/{number}", "digest")


def adapter(name: str, *numbers: int, default: int) -> ServedAdapter:
    return ServedAdapter(default, {number: version(name, number) for number in numbers})


VIEW = ServedView(
    {"alpha": adapter("alpha", 1, 3, default=3), "beta": adapter("beta", 2, default=2)}
)


def pool(view: ServedView = VIEW) -> ShardPool:
    shards = ShardPool([FakeShard()])
    shards.show(view)
    return shards


def test_a_pool_needs_a_shard() -> None:
    with pytest.raises(ValueError, match="needs a shard"):
        ShardPool([])


def test_no_adapter_is_the_base_model() -> None:
    assert pool().route("", None).version is None


def test_the_base_model_is_served_before_any_view_is_shown() -> None:
    assert ShardPool([FakeShard()]).route("", None).version is None


def test_an_adapter_without_a_version_is_its_default() -> None:
    assert pool().route("alpha", None).version == version("alpha", 3)


def test_a_version_is_that_version() -> None:
    assert pool().route("alpha", 1).version == version("alpha", 1)


def test_an_unknown_adapter_is_told_what_is_served() -> None:
    with pytest.raises(AdapterNotFound) as caught:
        pool().route("alpa", None)
    assert not isinstance(caught.value, VersionNotFound)
    assert caught.value.adapter == "alpa"
    assert str(caught.value) == "adapter 'alpa' is unknown; served here: alpha, beta"


def test_where_no_adapter_is_served_the_error_says_none() -> None:
    with pytest.raises(AdapterNotFound, match="served here: none"):
        pool(ServedView()).route("alpha", None)


def test_of_many_adapters_the_error_names_a_few() -> None:
    names = [f"adapter-{number:04}" for number in range(5000)]
    view = ServedView({name: adapter(name, 1, default=1) for name in names})
    with pytest.raises(AdapterNotFound) as caught:
        pool(view).route("alpha", None)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("number", [0, 2, 4])
def test_an_unknown_version_is_told_which_are_served(number: int) -> None:
    with pytest.raises(VersionNotFound) as caught:
        pool().route("alpha", number)
    assert (caught.value.adapter, caught.value.version) == ("alpha", number)
    assert str(caught.value) == f"adapter 'alpha' has no version {number}; served here: 1, 3"


def test_a_new_view_replaces_the_old_one_as_a_whole() -> None:
    shards = pool()
    shards.show(ServedView({"beta": adapter("beta", 2, 5, default=5)}))
    assert shards.route("beta", None).version == version("beta", 5)
    with pytest.raises(AdapterNotFound):
        shards.route("alpha", None)


def test_a_route_keeps_its_version_when_the_view_changes() -> None:
    shards = pool()
    route = shards.route("alpha", None)
    shards.show(ServedView())
    assert route.version == version("alpha", 3)


def test_vllm_sees_tenant_adapter_and_version_as_one_name() -> None:
    assert version("alpha", 3).lora_name == "acme/alpha@3"


async def test_a_route_generates_on_its_shard() -> None:
    route = pool().route("alpha", None)
    request = GenerationRequest("id", "one two", {"max_tokens": 2}, stream=False)
    prompt = await route.shard.render(request.prompt)
    async with contextlib.aclosing(route.generate(request, prompt)) as outputs:
        texts = [delta.text async for output in outputs for delta in output.deltas]
    assert texts == ["0 1 "]
