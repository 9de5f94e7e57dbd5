"""The gate for versions of checkpoints: rows and limits come from files, the report goes to one.

Asked by the catalog for every version of a checkpoint before it is READY, also for one that a
restart found half done. So nothing of this lives in memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.errors import AdapterNotChecked, InvalidRequest
from engine.gate import Fault, Gate, Limits, Measured, Reason, Row, faults
from engine.generation import ServedVersion
from engine.shard import Shard
from gateway import metrics
from gateway.checkpoint_sources import CheckpointSources
from gateway.publication_note import PublicationNote, read_note, write_note
from store.records import VersionRecord
from trainer.events import GateReport
from trainer.reference import Reference
from trainer.run_folder import REFERENCE_FILE
from trainer.served import ServedModel
from trainer.spec import GateSpec

logger = logging.getLogger(__name__)


class CheckpointGate:
    """A `Trial` of versions whose source is a checkpoint."""

    def __init__(self, sources: CheckpointSources, served: ServedModel) -> None:
        self._sources = sources
        self._served = served

    async def findings(
        self, record: VersionRecord, version: ServedVersion, shard: Shard
    ) -> Sequence[str]:
        """What trainer and engine do not agree on. See `Trial.findings`."""
        try:
            checkpoint = self._sources.checkpoint(record.source_uri)
            reference, note = await asyncio.to_thread(_read, checkpoint, record.adapter)
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be gated: %s", record.source_uri, error)
            reason = (
                "what the trainer says of the rows is gone: publish a checkpoint that is listed"
            )
            raise AdapterNotChecked(record.adapter, [reason], record.version) from error
        gate = Gate(shard, self._served.max_model_len)
        rows = [
            Row(row.token_ids, row.positions, row.logprobs, row.base_logprobs)
            for row in reference.rows
        ]
        try:
            measured = await gate.measure(rows, version, cache_salt=record.tenant)
        except InvalidRequest as error:
            metrics.observe_gate_rejection(Reason.OTHER)
            return [f"the engine cannot read a row that it was trained on ({error}): train again"]
        found = faults(measured, _limits(note.limits))
        noted = note.model_copy(update={"report": self._report(measured, reference, note)})
        await asyncio.to_thread(write_note, checkpoint, record.adapter, noted)
        _log(record, measured, reference)
        _count(found)
        return [fault.text for fault in found]

    def _report(
        self, measured: Measured, reference: Reference, note: PublicationNote
    ) -> GateReport | None:
        if not measured.is_finite:
            return None
        return GateReport(
            rows=measured.rows,
            tokens=measured.tokens,
            logprob_delta_mean=measured.logprob_delta_mean,
            logprob_delta_max=measured.logprob_delta_max,
            eval_loss=measured.eval_loss,
            base_eval_loss=measured.base_eval_loss,
            effect_mean=measured.effect_mean,
            trained_effect_mean=measured.trained_effect_mean,
            effect_ratio=measured.effect_ratio,
            limits=applied(note.limits),
            trained_as=reference.trained_as,
            served_as=self._served.dtype,
        )


def _read(checkpoint: Path, adapter: str) -> tuple[Reference, PublicationNote]:
    """Raises OSError or ValueError if one of them is not there."""
    reference = Reference.model_validate_json((checkpoint / REFERENCE_FILE).read_bytes())
    note = read_note(checkpoint, adapter)
    if note is None:
        raise ValueError("no limits are noted")
    for row in reference.rows:
        for logprobs in (row.logprobs, row.base_logprobs):
            if logprobs is not None and len(row.positions) != len(logprobs):
                raise ValueError("positions and log probabilities are not as many")
    return reference, note


def applied(limits: GateSpec) -> Mapping[str, float]:
    """Limits as a report has them: those that limit, by name."""
    return limits.model_dump(exclude_none=True)


def refusals(report: GateReport, limits: GateSpec) -> list[str]:
    """Why what was measured of an adapter before is not good enough for these resolved limits;
    empty if it is. Limits on what the release that measured it did not are not asked."""
    measured = Measured(
        rows=report.rows,
        tokens=report.tokens,
        logprob_delta_mean=report.logprob_delta_mean,
        logprob_delta_max=report.logprob_delta_max,
        eval_loss=report.eval_loss,
        base_eval_loss=report.base_eval_loss,
        effect_mean=report.effect_mean,
        trained_effect_mean=report.trained_effect_mean,
    )
    return [fault.text for fault in faults(measured, _limits(limits))]


def _limits(spec: GateSpec) -> Limits:
    return Limits(
        logprob_delta_mean=spec.max_logprob_delta_mean,
        logprob_delta=spec.max_logprob_delta,
        eval_loss_ratio=spec.max_eval_loss_ratio,
        eval_loss=spec.max_eval_loss,
        effect_ratio=spec.min_effect_ratio,
    )


def _count(found: Sequence[Fault]) -> None:
    for reason in {fault.reason for fault in found}:
        metrics.observe_gate_rejection(reason)


def _log(record: VersionRecord, measured: Measured, reference: Reference) -> None:
    ratio = measured.effect_ratio
    logger.info(
        "gate of %s version %d: %d rows, %d tokens, trained as %s: log probabilities differ by "
        "%.4g nats a token (at most %.4g), eval loss %.4g, of the base model %.4g, effect %.4g, "
        "which is %s of the trainer's",
        *(record.adapter, record.version, measured.rows, measured.tokens, reference.trained_as),
        *(measured.logprob_delta_mean, measured.logprob_delta_max),
        *(measured.eval_loss, measured.base_eval_loss),
        *(measured.effect_mean, "an unknown share" if ratio is None else f"{ratio:.2g}"),
    )
