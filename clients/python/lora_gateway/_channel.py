"""How the client's gRPC channel is set up."""

from __future__ import annotations

import json
from collections.abc import Sequence

import grpc
import grpc.aio

# Only what cannot do anything twice is tried again: a stream counts as begun with
# its first message, which the server holds back until there is a token, and
# generation leaves no trace. UNAVAILABLE alone, because an overloaded server
# needs fewer calls and not more. gRPC adds jitter to the backoff.
#
# Creating is safe because the client gives every request an id. Moving traffic is not:
# done twice it would leave one split more to roll back to, or none. Nor is deleting a job or a
# dataset: the second try would find nothing, and say so.
_RETRIED_METHODS = {
    "Inference": ("Generate", "GenerateStream", "Tokenize", "GetModel"),
    "Adapters": (
        "ValidateAdapter",
        "CreateAdapterVersion",
        "QueryUpload",
        "GetAdapter",
        "ListAdapters",
        "GetAdapterVersion",
        "ListAdapterVersions",
        "DeleteAdapterVersion",
        "CompareVersions",
        "RecordFeedback",
        "LoadAdapterVersion",
        "UnloadAdapterVersion",
        "WatchAdapters",
    ),
    "Training": (
        "QueryUpload",
        "ValidateDataset",
        "PreviewTokens",
        "GetDataset",
        "ListDatasets",
        "CreateJob",
        "EstimateJob",
        "GetJob",
        "ListJobs",
        "CancelJob",
        "WatchJob",
        "GetJobLogs",
        "ListCheckpoints",
        "PublishCheckpoint",
        "GetCapabilities",
    ),
    "Admin": ("ListShards", "DrainShard", "ResumeShard", "ExplainRoute"),
}
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": f"lora_gateway.v1.{service}", "method": method}
                for service, methods in _RETRIED_METHODS.items()
                for method in methods
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # When about half of the last calls failed, nothing is tried again until some
    # succeed: a server that is down must not get four times the load.
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}

# gRPC ignores keys that it does not know without a word: copy, do not type.
_OPTIONS: Sequence[tuple[str, str | int]] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # Requests above this are not tried again. The default, 256 KiB, is less than a
    # long chat.
    ("grpc.per_rpc_retry_buffer_size", 16 * 2**20),
    # A dead server is noticed in under a minute. The server allows a ping every 10 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A client that idles or waits for a long prefill must see it too, and must keep
    # its place in the tables of whatever NAT is between.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The server bounds what it sends; the default, 4 MiB, is less than the
    # log probabilities of a long prompt.
    ("grpc.max_receive_message_length", -1),
)


def open_channel(target: str, tls: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """A channel to `target`, in plain text without `tls`. It connects with its first call."""
    if tls is None:
        return grpc.aio.insecure_channel(target, _OPTIONS)
    return grpc.aio.secure_channel(target, tls, _OPTIONS)
