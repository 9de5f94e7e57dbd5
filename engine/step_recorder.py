"""Has a core write down what it computes. Runs in the core, through `engine/core_plugin.py`.

Two methods of its scheduler are wrapped, by which each step of `EngineCore.step` and
`step_with_batch_queue` begins and ends (vllm/v1/engine/core.py:636 and 681): `schedule` returns
what the model is to compute next, and `update_from_output` has taken what came of it. A step that
raises in between, in the model, the sampler or a grammar, or that ends the process, stays open.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.step_record import StepRecord


class StepRecorder:
    """Wraps the scheduler of one core, for its life."""

    def __init__(self, core: Any, path: Path) -> None:
        """Begins at once; to be called between two steps. Raises OSError."""
        config = core.vllm_config
        self._scheduler = core.scheduler
        self._executor = core.model_executor
        # One more than can be on their way: a step that raises is written over by no other.
        self._record = StepRecord(
            path,
            core.batch_queue_size + 1,
            config.scheduler_config.max_num_seqs,
            config.lora_config.max_loras if config.lora_config else 0,
        )
        self._slots: dict[int, int] = {}
        """Of the steps on their way, by the identity of what was scheduled."""
        self._schedule = core.scheduler.schedule
        self._update = core.scheduler.update_from_output
        self._tell_dead = core._send_engine_dead
        core.scheduler.schedule = self.schedule
        core.scheduler.update_from_output = self.update_from_output
        core._send_engine_dead = self.send_engine_dead

    def schedule(self, *arguments: Any, **options: Any) -> Any:
        """What is to be computed next, once it is written down."""
        try:
            scheduled = self._schedule(*arguments, **options)
        except Exception:
            known = self._scheduler.requests  # whoever made it raise is among all of them
            self._begin([], list(known))
            raise
        if scheduled.num_scheduled_tokens:
            new = [request.req_id for request in scheduled.scheduled_new_reqs]
            slot = self._begin(new, scheduled.scheduled_cached_reqs.req_ids)
            self._slots[id(scheduled)] = slot
        return scheduled

    def update_from_output(self, scheduled: Any, *arguments: Any, **options: Any) -> Any:
        """Hand out what was computed, and cross the step out."""
        outputs = self._update(scheduled, *arguments, **options)
        if (slot := self._slots.pop(id(scheduled), None)) is not None:
            self._record.end(slot)
        return outputs

    def send_engine_dead(self) -> None:
        """Before the clients hear of a death by exception: who had died before."""
        workers = getattr(self._executor, "workers", ())
        codes = [worker.proc.exitcode for worker in workers]
        self._record.note_exits([code for code in codes if code is not None])
        self._tell_dead()

    def _begin(self, fresh: list[str], older: list[str]) -> int:
        known = self._scheduler.requests
        versions = set()
        for ids in (fresh, older):
            for request_id in ids:
                lora = getattr(known.get(request_id), "lora_request", None)
                versions.add("" if lora is None else lora.lora_name)
        return self._record.begin(fresh, older, versions)
