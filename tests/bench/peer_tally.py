"""What a server of vLLM's has counted, by its metrics page."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

ENDED, GENERATED = "vllm:request_success_total", "vllm:generation_tokens_total"
WHOLE = "length"
"""The only good end of a request that ignores the end of sequence."""


@dataclass(frozen=True, slots=True)
class PeerTally:
    """Since its start."""

    good: int
    """Requests that ended with all tokens that they asked for."""
    other: int
    """Requests that ended in any other way."""
    tokens: int
    """Generated."""

    @classmethod
    def of(cls, page: str) -> PeerTally:
        """What the page says. A counter that is not there has not counted yet."""
        samples = [
            sample for family in text_string_to_metric_families(page) for sample in family.samples
        ]
        ended = [sample for sample in samples if sample.name == ENDED]
        good = sum(sample.value for sample in ended if sample.labels["finished_reason"] == WHOLE)
        return cls(
            good=int(good),
            other=int(sum(sample.value for sample in ended) - good),
            tokens=int(sum(sample.value for sample in samples if sample.name == GENERATED)),
        )

    def since(self, before: PeerTally) -> PeerTally:
        """What came after that."""
        return PeerTally(
            self.good - before.good, self.other - before.other, self.tokens - before.tokens
        )
