"""What is in quarantine, as whoever runs the gateway sees it. Pure."""

from __future__ import annotations

import re

from engine.errors import Violation
from engine.generation import VersionKey, lora_name_of
from engine.quarantine import Kind, Quarantined
from gateway.adapter_codec import encode_time, name_violations, refuse
from gateway.call import Principal
from lora_gateway.v1 import admin_pb2 as pb

_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
_LORA_NAME = re.compile(r"(?P<tenant>[^/]+)/(?P<adapter>[^/@]+)@(?P<version>\d+)")


def decode_subject(request: pb.LiftQuarantineRequest) -> tuple[Kind, int | str]:
    """What is to be released. Raises InvalidRequest."""
    match request.WhichOneof("subject"):
        case "fingerprint":
            if not _FINGERPRINT.fullmatch(request.fingerprint):
                refuse([Violation("fingerprint", "must be 16 hex digits, as ListQuarantine lists")])
            return Kind.REQUEST, int(request.fingerprint, 16)
        case "version":
            name = request.version
            wrong = list(name_violations(name.adapter, "version.adapter"))
            if not name.version:
                wrong.append(Violation("version.version", "is required"))
            refuse(wrong)
            key = VersionKey(name.tenant or Principal().tenant, name.adapter, name.version)
            return Kind.ADAPTER_VERSION, lora_name_of(key)
    refuse([Violation("subject", "is required: a fingerprint, or a version")])
    raise AssertionError


def encode_quarantine(held: Quarantined) -> pb.ListQuarantineResponse:
    """All that is in quarantine."""
    return pb.ListQuarantineResponse(
        requests=[
            pb.QuarantinedRequest(
                fingerprint=f"{fingerprint:016x}", until_time=encode_time(int(until_s * 1e9))
            )
            for fingerprint, until_s in held.requests.items()
        ],
        versions=[_version(name, until_s) for name, until_s in held.versions.items()],
        suspect_count=len(held.suspects),
    )


def _version(lora_name: str, until_s: float) -> pb.QuarantinedVersion:
    named = _LORA_NAME.fullmatch(lora_name)
    assert named is not None, "lora_name_of made it"
    return pb.QuarantinedVersion(
        tenant=named["tenant"],
        adapter=named["adapter"],
        version=int(named["version"]),
        until_time=encode_time(int(until_s * 1e9)),
    )
