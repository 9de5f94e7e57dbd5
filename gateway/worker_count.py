"""How many workers serve the public address, where nobody has said.

`python -m tests.bench.edge` measures what one worker bears, and `tests/gpu/` what a core gives
(docs/benchmarks.md).
"""

from __future__ import annotations

MAX_WORKERS = 32
CORE_TOKENS_PER_S = 36_000
"""What one engine core gives at most, with a model so small that its own loop is the limit."""
WORKER_TOKENS_PER_S = 20_000
"""What the event loop of one worker streams, one message a token. Several that share a core give
less each: two of them 0.76 of what it gives to a bare AsyncLLM, and four 0.95."""


def default_workers(shards: int, gpus_per_shard: int, processors: int) -> int:
    """As many as carry all that the shards can give, and no more than have a processor.

    Engines on the CPU, which have no GPU, bind their threads to all processors but one, so there is
    room for one worker; and it streams more than such an engine gives. On GPUs each core takes a
    processor, and so does each GPU of a shard that has several.
    """
    if not gpus_per_shard:
        return 1
    taken = shards * (1 if gpus_per_shard == 1 else 1 + gpus_per_shard)
    wanted = shards * -(-CORE_TOKENS_PER_S // WORKER_TOKENS_PER_S)
    return max(1, min(wanted, processors - taken, MAX_WORKERS))
