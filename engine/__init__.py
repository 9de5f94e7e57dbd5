"""vLLM behind a small seam: shards, the pool over them, adapters, models.

Knows no gRPC and no protobuf, and is imported by `gateway` alone.
"""
