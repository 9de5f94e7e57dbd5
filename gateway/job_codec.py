"""Jobs, their events and what becomes of them, as callers see them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.duration_pb2 import Duration

from engine.errors import Violation
from gateway.adapter_codec import encode_time
from gateway.spec_codec import encode, encode_spec
from lora_gateway.v1 import errors_pb2
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.inference_pb2 import ModelFingerprints
from store.job_records import EventKind, JobEventRecord, JobRecord, JobState
from trainer.claim import MAX_PRIORITY, MIN_PRIORITY
from trainer.estimate import Estimate
from trainer.events import (
    Checkpoint,
    GateReport,
    JobFailure,
    Manifest,
    Notice,
    Progress,
    Publication,
    PublicationState,
)
from trainer.journal import Heartbeat
from trainer.recovery import attempts_left, recovery_of
from trainer.spec import InitFrom, JobSpec

_STATES = {state: pb.JobState.Value(f"JOB_STATE_{state.name}") for state in JobState}
_STATE_OF_NUMBER = {int(number): state for state, number in _STATES.items()}


def decode_states(numbers: Iterable[int], wrong: list[Violation]) -> list[JobState]:
    """The states of these numbers; those that are none are added to `wrong`."""
    states = []
    for index, number in enumerate(numbers):
        if number in _STATE_OF_NUMBER:
            states.append(_STATE_OF_NUMBER[number])
        else:
            wrong.append(Violation(f"states[{index}]", f"has no value {number}"))
    return states


def priority_violations(priority: int) -> Iterable[Violation]:
    """What is wrong with a priority."""
    if not MIN_PRIORITY <= priority <= MAX_PRIORITY:
        yield Violation("priority", f"must be {MIN_PRIORITY} to {MAX_PRIORITY}")


def encode_draft(request: pb.CreateJobRequest, resolved: JobSpec) -> pb.Job:
    """A job that was only checked. It has no state: it is none yet."""
    publishes = resolved.publish is not None
    state = PublicationState.PENDING if publishes else PublicationState.NOT_REQUESTED
    return pb.Job(
        name=request.job_id,
        spec=request.spec,
        effective_spec=encode(resolved, pb.JobSpec()),
        publication=encode_publication(Publication(state=state, adapter=resolved.adapter)),
        labels=request.labels,
        priority=request.priority,
    )


def encode_heartbeat(heartbeat: Heartbeat) -> pb.Heartbeat:
    """A sign of life."""
    seen_ns = heartbeat.trainer_time_ns
    return pb.Heartbeat(
        sequence=heartbeat.sequence,
        state=_STATES[heartbeat.state],
        trainer_time=None if seen_ns is None else encode_time(seen_ns),
    )


def encode_estimate(estimate: Estimate, queue_position: int) -> pb.Estimate:
    """What a job would cost, and its place in the queue."""
    return pb.Estimate(
        tokens=estimate.tokens,
        steps=estimate.steps,
        rows=estimate.rows,
        memory_bytes=estimate.memory_bytes,
        memory_available_bytes=estimate.memory_available_bytes,
        duration=encode_duration(estimate.duration_s),
        cost=estimate.cost,
        currency=estimate.currency,
        adapter_bytes=estimate.adapter_bytes,
        lora_scale=estimate.lora_scale,
        measured=estimate.measured,
        warnings=estimate.warnings,
        queue_position=queue_position,
    )


def encode_job(record: JobRecord, queue_position: int = 0) -> pb.Job:
    """A job as it stands."""
    start, end = record.start_time_ns, record.end_time_ns
    checkpoint_step = 0
    if record.manifest is not None:
        checkpoint_step = Manifest.model_validate(record.manifest).checkpoint.step
    recovery = recovery_of(record)
    recovers = record.state is JobState.RECOVERING
    return pb.Job(
        name=record.name,
        spec=encode_spec(record.spec),
        effective_spec=encode_spec(record.effective_spec),
        state=_STATES[record.state],
        publication=encode_publication(Publication.model_validate(record.publication)),
        error=None if record.error is None else _error(record.error),
        progress=(
            None
            if record.progress is None
            else encode_progress(Progress.model_validate(record.progress))
        ),
        last_sequence=record.last_sequence,
        create_time=encode_time(record.create_time_ns),
        start_time=None if start is None else encode_time(start),
        end_time=None if end is None else encode_time(end),
        queue_position=queue_position,
        checkpoint_step=checkpoint_step,
        manifest=None if record.manifest is None else _manifest(record.manifest),
        labels=record.labels,
        priority=record.priority,
        attempt=record.attempt,
        notices=[_notice(notice) for notice in record.notices],
        attempts_left=attempts_left(JobSpec.model_validate(record.effective_spec), recovery),
        resumed_from=(
            None
            if recovery.resumed_from is None
            else encode_checkpoint(recovery.resumed_from, record.name)
        ),
        lost_steps=recovery.lost_steps,
        retry_time=encode_time(recovery.retry_time_ns) if recovers else None,
    )


def encode_event(event: JobEventRecord, job: str) -> pb.JobEvent:
    """One change."""
    message = pb.JobEvent(
        sequence=event.sequence, time=encode_time(event.time_ns), attempt=event.attempt
    )
    payload = event.payload
    match event.kind:
        case EventKind.STATE_CHANGED:
            message.state_changed.CopyFrom(_state_changed(payload))
        case EventKind.PROGRESS:
            message.progress.CopyFrom(encode_progress(Progress.model_validate(payload)))
        case EventKind.CHECKPOINT:
            checkpoint = encode_checkpoint(Checkpoint.model_validate(payload), job)
            message.checkpoint.CopyFrom(checkpoint)
        case EventKind.PUBLICATION:
            publication = encode_publication(Publication.model_validate(payload))
            message.publication.CopyFrom(publication)
        case EventKind.NOTICE:
            message.notice.CopyFrom(_notice(payload))
    return message


def encode_progress(progress: Progress) -> pb.Progress:
    """Where a run stands."""
    return pb.Progress(
        step=progress.step,
        total_steps=progress.total_steps,
        epoch=progress.epoch,
        tokens_seen=progress.tokens_seen,
        trained_tokens=progress.trained_tokens,
        tokens_per_second=progress.tokens_per_second,
        loss=progress.loss,
        eval_loss=progress.eval_loss,
        learning_rate=progress.learning_rate,
        grad_norm=progress.grad_norm,
        memory_bytes=progress.memory_bytes,
        memory_peak_bytes=progress.memory_peak_bytes,
        eta=encode_duration(progress.eta_s),
        elapsed=encode_duration(progress.elapsed_s),
    )


def encode_checkpoint(checkpoint: Checkpoint, job: str) -> pb.Checkpoint:
    """A saved state."""
    return pb.Checkpoint(
        job=job,
        step=checkpoint.step,
        size_bytes=checkpoint.size_bytes,
        sha256=checkpoint.sha256,
        eval_loss=checkpoint.eval_loss,
        create_time=encode_time(checkpoint.create_time_ns),
        final=checkpoint.final,
    )


def encode_publication(publication: Publication) -> pb.Publication:
    """What became of an adapter."""
    state = pb.PublicationState.Value(f"PUBLICATION_STATE_{publication.state.name}")
    return pb.Publication(
        state=state,
        adapter=publication.adapter,
        version=publication.version,
        reasons=publication.reasons,
        gate=None if publication.gate is None else _gate(publication.gate),
        traffic_percent=publication.traffic_percent,
    )


def encode_duration(duration_s: float) -> Duration:
    """A span of time, from seconds."""
    duration = Duration()
    duration.FromNanoseconds(round(max(duration_s, 0.0) * 1e9))
    return duration


def _gate(gate: GateReport) -> pb.GateReport:
    return pb.GateReport(
        rows=gate.rows,
        tokens=gate.tokens,
        logprob_delta_mean=gate.logprob_delta_mean,
        logprob_delta_max=gate.logprob_delta_max,
        eval_loss=gate.eval_loss,
        base_eval_loss=gate.base_eval_loss,
        effect_mean=gate.effect_mean,
        trained_effect_mean=gate.trained_effect_mean,
        effect_ratio=gate.effect_ratio,
        limits=pb.GateSpec(**gate.limits),
        trained_as=gate.trained_as,
        served_as=gate.served_as,
    )


def _state_changed(payload: Mapping[str, Any]) -> pb.StateChanged:
    previous, error = payload.get("previous_state"), payload.get("error")
    return pb.StateChanged(
        previous_state=(
            pb.JOB_STATE_UNSPECIFIED if previous is None else _STATES[JobState(previous)]
        ),
        state=_STATES[JobState(payload["state"])],
        error=None if error is None else _error(error),
    )


def _error(payload: Mapping[str, Any]) -> pb.JobError:
    failure = JobFailure.model_validate(payload)
    return pb.JobError(
        reason=errors_pb2.ErrorReason.Value(f"ERROR_REASON_{failure.reason.value}"),
        message=failure.message,
        metadata=failure.metadata,
    )


def _notice(payload: Mapping[str, Any]) -> pb.Notice:
    notice = Notice.model_validate(payload)
    return pb.Notice(code=notice.code, message=notice.message)


def _manifest(payload: Mapping[str, Any]) -> pb.Manifest:
    manifest = Manifest.model_validate(payload)
    init_from = manifest.effective_spec.get("init_from")
    return pb.Manifest(
        sha256=manifest.sha256,
        dataset_sha256=manifest.dataset_sha256,
        rows_sha256=manifest.rows_sha256,
        base_model=manifest.base_model,
        fingerprints=ModelFingerprints(**manifest.fingerprints),
        versions=manifest.versions,
        seed=manifest.seed,
        device=manifest.device,
        files=manifest.files,
        final_loss=manifest.final_loss,
        init_from=(
            None if init_from is None else encode(InitFrom.model_validate(init_from), pb.InitFrom())
        ),
    )
