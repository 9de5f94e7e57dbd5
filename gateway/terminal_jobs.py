"""What `gateway jobs` and `gateway train` show of jobs, estimates, events and publications."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from gateway.terminal import as_json
from gateway.terminal_table import (
    duration_text,
    print_rows,
    print_table,
    printable,
    size_text,
    table,
    time_text,
)
from lora_gateway import (
    Checkpoint,
    ErrorReason,
    Estimate,
    GateReport,
    InitFrom,
    Job,
    JobEvent,
    JobState,
    Progress,
    Publication,
    PublicationState,
)

_PUBLISHED = (
    PublicationState.PUBLICATION_STATE_SERVING,
    PublicationState.PUBLICATION_STATE_NOT_REQUESTED,
    # A publication is unset where nobody asked for one.
    PublicationState.PUBLICATION_STATE_UNSPECIFIED,
)


def print_job(job: Job, json: bool) -> None:
    """The job, as a table of fields or as JSON."""
    if json:
        typer.echo(as_json(job))
        return
    print_rows(
        ("job", job.name),
        ("state", state_text(job.state)),
        ("error", error_text(job)),
        ("queue_position", str(job.queue_position or "")),
        ("priority", str(job.priority or "")),
        ("dataset", job.spec.dataset),
        ("adapter", job.spec.adapter),
        ("init_from", _init_from_text(job.effective_spec.init_from)),
        ("progress", progress_text(job.progress) if job.HasField("progress") else ""),
        ("checkpoint_step", str(job.checkpoint_step or "")),
        ("attempt", f"{job.attempt}, {job.attempts_left} left" if job.attempt else ""),
        ("resumed_from", f"step {job.resumed_from.step}" if job.HasField("resumed_from") else ""),
        ("lost_steps", str(job.lost_steps or "")),
        ("retry_time", time_text(job.retry_time) if job.HasField("retry_time") else ""),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted(job.labels.items()))),
        ("create_time", time_text(job.create_time)),
        ("start_time", time_text(job.start_time)),
        ("end_time", time_text(job.end_time)),
        ("final_loss", f"{job.manifest.final_loss:.4g}" if job.HasField("manifest") else ""),
        ("manifest", job.manifest.sha256),
        *(("notice", f"{notice.code}: {notice.message}") for notice in job.notices),
    )
    if job.HasField("publication"):
        print_publication(job.publication)


def print_jobs(jobs: Iterable[Job]) -> None:
    """A table, one job a row."""
    columns = ("job", "state", "queue", "priority", "adapter", "dataset", "step", "loss")
    shown = table(*columns, "published", "created")
    for job in jobs:
        steps = f"{job.progress.step}/{job.progress.total_steps}"
        shown.add_row(
            printable(job.name),
            state_text(job.state),
            str(job.queue_position or ""),
            str(job.priority or ""),
            printable(job.spec.adapter),
            printable(job.spec.dataset),
            steps if job.HasField("progress") else "",
            f"{job.progress.loss:.4g}" if job.progress.HasField("loss") else "",
            _published(job.publication) if job.HasField("publication") else "",
            time_text(job.create_time),
        )
    print_table(shown)


def print_estimate(estimate: Estimate) -> None:
    """What a job would cost, and what is to be known of it."""
    available = size_text(estimate.memory_available_bytes)
    source = "measured" if estimate.measured else "from nominal rates"
    cost = f"{estimate.cost:.2f} {estimate.currency}" if estimate.HasField("cost") else ""
    print_rows(
        ("steps", f"{estimate.steps:,}"),
        ("tokens", f"{estimate.tokens:,}"),
        ("memory", f"{size_text(estimate.memory_bytes)} of {available}"),
        ("time", f"{duration_text(estimate.duration.ToTimedelta().total_seconds())} ({source})"),
        ("cost", cost),
        ("queue", f"number {estimate.queue_position}" if estimate.queue_position else ""),
        ("adapter", size_text(estimate.adapter_bytes)),
        ("lora_scale", f"{estimate.lora_scale:.4g}"),
        *(("warning", warning) for warning in estimate.warnings),
    )


def print_checkpoints(checkpoints: Iterable[Checkpoint]) -> None:
    """A table, one checkpoint a row."""
    shown = table("step", "size", "eval loss", "final", "created", "sha256")
    for checkpoint in checkpoints:
        shown.add_row(
            str(checkpoint.step),
            size_text(checkpoint.size_bytes),
            f"{checkpoint.eval_loss:.4g}" if checkpoint.HasField("eval_loss") else "",
            "yes" if checkpoint.final else "no",
            time_text(checkpoint.create_time),
            printable(checkpoint.sha256),
        )
    print_table(shown)


def print_publication(publication: Publication) -> None:
    """What became of an adapter, with what the gate measured and why it said no."""
    rows = [("published", _published(publication))]
    if publication.HasField("gate"):
        rows += _gate_rows(publication.gate)
    rows += [("reason", reason) for reason in publication.reasons]
    print_rows(*rows)


def event_line(event: JobEvent) -> str:
    """One event: when, and what."""
    match event.WhichOneof("payload"):
        case "state_changed":
            error = event.state_changed.error
            text = state_text(event.state_changed.state)
            if event.state_changed.HasField("error"):
                text += f" {_reason(error.reason)}: {error.message}"
        case "progress":
            text = progress_text(event.progress)
        case "checkpoint":
            size = size_text(event.checkpoint.size_bytes)
            text = f"checkpoint of step {event.checkpoint.step} saved ({size})"
        case "publication":
            text = f"publication {_published(event.publication)}"
            text += "".join(f"; {reason}" for reason in event.publication.reasons)
        case "notice":
            text = f"notice {event.notice.code}: {event.notice.message}"
        case _:
            text = "something that is newer than this command"
    return printable(f"{event.sequence} {time_text(event.time)} {text}")


def progress_text(progress: Progress) -> str:
    """Where a run stands."""
    parts = [f"step {progress.step}/{progress.total_steps}"]
    for name, label in (("loss", "loss"), ("eval_loss", "eval loss"), ("learning_rate", "lr")):
        if progress.HasField(name):  # type: ignore[arg-type]  # a name of the contract
            parts.append(f"{label} {getattr(progress, name):.4g}")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:.0f} tokens/s")
    if progress.HasField("eta"):
        parts.append(f"ETA {duration_text(progress.eta.ToTimedelta().total_seconds())}")
    return ", ".join(parts)


def succeeded(job: Job) -> bool:
    """Whether all that was asked of the job was done."""
    trained = job.state == JobState.JOB_STATE_SUCCEEDED
    return trained and job.publication.state in _PUBLISHED


def error_text(job: Job) -> str:
    """Why it FAILED; empty otherwise."""
    return f"{_reason(job.error.reason)}: {job.error.message}" if job.HasField("error") else ""


def state_text(state: JobState.ValueType) -> str:
    """By its name without the prefix."""
    known = JobState.DESCRIPTOR.values_by_number.get(state)
    return known.name.removeprefix("JOB_STATE_") if known else str(state)


def _init_from_text(init_from: InitFrom) -> str:
    """What the adapter began with; empty: it is new."""
    match init_from.WhichOneof("source"):
        case "adapter_version":
            return f"{init_from.adapter_version.adapter}@{init_from.adapter_version.version}"
        case "checkpoint":
            return f"{init_from.checkpoint.job}/{init_from.checkpoint.step}"
        case _:
            return ""


def _gate_rows(gate: GateReport) -> list[tuple[str, str]]:
    limits = gate.limits
    mean = _limited(gate.logprob_delta_mean, limits, "max_logprob_delta_mean")
    worst = _limited(gate.logprob_delta_max, limits, "max_logprob_delta")
    ratio = f"at most {limits.max_eval_loss_ratio:g} of it"
    base = f"the base model has {gate.base_eval_loss:.4g}"
    limited = limits.HasField("max_eval_loss_ratio")
    return [
        ("gate rows", f"{gate.rows:,} with {gate.tokens:,} trained tokens"),
        ("logprob difference", f"mean {mean}, worst {worst} (trainer to engine, nats a token)"),
        (
            "eval loss",
            f"{_limited(gate.eval_loss, limits, 'max_eval_loss')}, {base}"
            f"{f' ({ratio})' if limited else ''}",
        ),
        ("effect", _effect_text(gate)),
        ("trained as", f"{gate.trained_as}, served as {gate.served_as}"),
    ]


def _effect_text(gate: GateReport) -> str:
    text = f"{gate.effect_mean:.4g} nats a token"
    if not gate.HasField("effect_ratio"):
        return text
    least = f" (at least {gate.limits.min_effect_ratio:g})"
    limited = gate.limits.HasField("min_effect_ratio")
    trained = f"{gate.effect_ratio:.2g} of the trainer's {gate.trained_effect_mean:.4g}"
    return f"{text}, {trained}{least if limited else ''}"


def _limited(value: float, limits: object, name: str) -> str:
    """The value, with its limit if there is one."""
    if not limits.HasField(name):  # type: ignore[attr-defined]  # of the contract's GateSpec
        return f"{value:.4g}"
    return f"{value:.4g} (at most {getattr(limits, name):g})"


def _published(publication: Publication) -> str:
    known = PublicationState.DESCRIPTOR.values_by_number.get(publication.state)
    state = known.name.removeprefix("PUBLICATION_STATE_") if known else str(publication.state)
    if not publication.version:
        return state
    traffic = f" with {publication.traffic_percent} % of the traffic"
    serving = publication.state == PublicationState.PUBLICATION_STATE_SERVING
    return f"{state} {publication.adapter}@{publication.version}{traffic if serving else ''}"


def _reason(reason: ErrorReason.ValueType) -> str:
    known = ErrorReason.DESCRIPTOR.values_by_number.get(reason)
    return known.name.removeprefix("ERROR_REASON_") if known else str(reason)
