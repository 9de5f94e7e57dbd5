"""Datasets and what reading them found, from protobuf and back. Pure."""

from __future__ import annotations

from engine.errors import Violation
from gateway.adapter_codec import encode_time, name_violations, refuse, upload_id_violations
from lora_gateway.v1 import training_pb2 as pb
from store.job_records import DatasetRecord
from store.records import DIGEST
from store.upload_folder import DatasetPlan
from store.uploads import UploadStatus
from trainer.report import DatasetReport, LineIssue, TokenStatistics
from trainer.spec import DatasetFormat

MAX_DATASET_BYTES = 4 * 1024**3
DEFAULT_ISSUES, MAX_ISSUES = 100, 10_000

UNDETECTED = pb.DATASET_FORMAT_UNSPECIFIED

_FORMATS = {
    format: pb.DatasetFormat.Value(f"DATASET_FORMAT_{format.name}") for format in DatasetFormat
}
_FORMAT_OF_NUMBER = {number: format for format, number in _FORMATS.items()}


def decode_header(header: pb.DatasetHeader) -> DatasetPlan:
    """What is going to be uploaded."""
    wrong = [
        *name_violations(header.dataset, "header.dataset"),
        *upload_id_violations(header.upload_id, "header.upload_id"),
    ]
    if not 1 <= header.size_bytes <= MAX_DATASET_BYTES:
        wrong.append(
            Violation(
                "header.size_bytes",
                f"must be 1 to {MAX_DATASET_BYTES}; an empty file trains nothing",
            )
        )
    if not DIGEST.fullmatch(header.sha256):
        wrong.append(Violation("header.sha256", "is required, as 64 lower-case hex digits"))
    if header.format and header.format not in _FORMAT_OF_NUMBER:
        wrong.append(Violation("header.format", f"has no value {header.format}"))
    refuse(wrong)
    format = _FORMAT_OF_NUMBER.get(header.format)
    return DatasetPlan(
        upload_id=header.upload_id,
        dataset=header.dataset,
        size_bytes=header.size_bytes,
        sha256=header.sha256,
        format="" if format is None else format.value,
    )


def decode_max_issues(request: pb.ValidateDatasetRequest) -> int:
    """How many issues to list."""
    count = request.max_issues if request.HasField("max_issues") else DEFAULT_ISSUES
    if not 1 <= count <= MAX_ISSUES:
        refuse([Violation("max_issues", f"must be 1 to {MAX_ISSUES}")])
    return count


def encode_dataset(record: DatasetRecord) -> pb.Dataset:
    """A dataset."""
    return pb.Dataset(
        name=record.name,
        sha256=record.sha256,
        size_bytes=record.size_bytes,
        format=_FORMATS[DatasetFormat(record.format)] if record.format else UNDETECTED,
        create_time=encode_time(record.create_time_ns),
    )


def encode_upload(status: UploadStatus) -> pb.TrainingQueryUploadResponse:
    """Where an upload stands."""
    expires_s = status.expire_time_s
    return pb.TrainingQueryUploadResponse(
        offset=status.offset,
        size_bytes=status.size_bytes,
        expire_time=None if expires_s is None else encode_time(int(expires_s * 1e9)),
    )


def encode_report(report: DatasetReport, max_issues: int) -> pb.DatasetReport:
    """What was found; lists are cut to `max_issues`."""
    return pb.DatasetReport(
        valid=report.valid,
        reasons=report.reasons,
        format=UNDETECTED if report.format is None else _FORMATS[report.format],
        total_lines=report.total_lines,
        bad_lines=report.bad_lines,
        issues=[_issue(issue) for issue in report.issues[:max_issues]],
        rows=report.rows,
        overlength_rows=report.overlength_rows,
        overlength_lines=report.overlength_lines[:max_issues],
        truncated_rows=report.truncated_rows,
        duplicate_rows=report.duplicate_rows,
        duplicate_lines=report.duplicate_lines[:max_issues],
        untrained_rows=report.untrained_rows,
        tokens=_statistics(report.tokens),
        issue_counts={code.name: count for code, count in report.issue_counts.items()},
    )


def _issue(issue: LineIssue) -> pb.LineIssue:
    return pb.LineIssue(
        line=issue.line,
        code=pb.LineIssueCode.Value(f"LINE_ISSUE_CODE_{issue.code.name}"),
        field=issue.field,
        message=issue.message,
    )


def _statistics(tokens: TokenStatistics) -> pb.TokenStatistics:
    return pb.TokenStatistics(
        total=tokens.total,
        trained=tokens.trained,
        mean=tokens.mean,
        p50=tokens.p50,
        p95=tokens.p95,
        max=tokens.max,
        histogram=[pb.LengthBucket(up_to=b.up_to, rows=b.rows) for b in tokens.histogram],
    )
