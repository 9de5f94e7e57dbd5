"""On what terms shards lend their devices to training, as the operator has set them."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.settings import Settings
from trainer.devices import CPU


@dataclass(frozen=True, slots=True)
class Terms:
    """The same for all shards."""

    takes_last: bool
    """Whether a shard without which nobody would answer is lent too."""
    grace_s: float
    """How long what runs there may take to end."""
    notice_s: float
    """How long health says that it will be gone, before it is."""
    limit_s: float | None
    """After which a device is wanted back."""
    rest_s: float
    """For which a shard serves before it is lent again."""

    @classmethod
    def of(cls, settings: Settings) -> Terms:
        """Those of a gateway. What drains a shard drains as the gateway does when it ends."""
        return cls(
            takes_last=settings.lend_shards == "always",
            grace_s=settings.drain_grace_s,
            notice_s=settings.drain_delay_s,
            limit_s=settings.lend_limit_s,
            rest_s=settings.lend_rest_s,
        )


def lender_of(settings: Settings, device: str) -> str:
    """The shard that lends this device; empty: none does. The CPU is lent by the last one, which
    has a share of the processors."""
    if not settings.lends:
        return ""
    for number, name in enumerate(settings.shard_names):
        if device in settings.gpus(number):
            return name
    runs_on_cpu = not settings.gpus(0)
    return settings.shard_names[-1] if device == CPU and runs_on_cpu else ""
