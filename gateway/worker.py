"""A worker: one process that serves the public address.

It is started by the host with its imports ahead of need, waits for `Orders`, attaches to the
running cores and takes calls until the host says `Drain` or is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from multiprocessing.connection import Connection

import uvloop

from engine.errors import ShardUnavailable
from engine.pool import ShardPool
from engine.screening import Screening
from engine.shard import VllmShard, preload
from gateway import metrics
from gateway.adapter_labels import AdapterLabels
from gateway.admission import Admission, Draining
from gateway.arms import Outcome, Reporter
from gateway.attachments import Attachments
from gateway.call import Call
from gateway.channel import Channel
from gateway.explanation import explain
from gateway.inference import Inference
from gateway.log_lines import configure_logging
from gateway.messages import (
    Acquitted,
    Answer,
    AreYouThere,
    Ask,
    Drain,
    Ended,
    Explain,
    Failed,
    Flush,
    FollowDrains,
    FollowPlan,
    FollowQuarantine,
    HostMessage,
    Imported,
    Leave,
    Loaded,
    LoadFailed,
    NameAdapters,
    Orders,
    Placed,
    Question,
    RecallSlot,
    Serving,
    ShardDied,
    ShardUp,
    ShowAdapter,
    SlotGranted,
    SlotWithdrawn,
    TellPlaced,
    TellUses,
    Used,
    WorkerMessage,
)
from gateway.model_card import model_card
from gateway.relay import Relay
from gateway.server import ENDLESS_METHODS, HOST_PATHS, GatewayServer
from gateway.token_meter import TokenMeter
from gateway.tracing import Tracing
from gateway.wrap import Edge

logger = logging.getLogger(__name__)

HostChannel = Channel[WorkerMessage, HostMessage]

STALLED_AFTER_S = 1.0
"""A write that waits this long for its reader counts as stalled."""
LAG_SAMPLES_PER_S = 20
CUT_TIMEOUT_S = 5.0
"""How long calls get to send their last status after they were cut."""


def worker_main(connection: Connection) -> None:
    """Entry of the process. It ends with its host; signals of the process group are blocked."""
    configure_logging()
    preload()
    uvloop.run(_run(connection))


async def _run(connection: Connection) -> None:
    channel: HostChannel = Channel(connection)
    channel.send(Imported())
    message = await channel.receive()
    if isinstance(message, Orders):
        try:
            worker = Worker(message, channel)
            await worker.start()
        except Exception as error:
            logger.exception("worker could not serve")
            channel.send(Failed(f"{type(error).__name__}: {error}"))
            return
        channel.send(Serving())
        await worker.run()
    channel.close()


class WorkerUnfit(Exception):
    """This process cannot serve. The message says why, in one line."""


class Worker:
    """Everything that one worker owns, from attaching to its end."""

    def __init__(self, orders: Orders, channel: HostChannel) -> None:
        settings = orders.settings
        self._orders = orders
        self._channel = channel
        self._view = orders.view
        self._pool = ShardPool((), {}, self._view, orders.shards)
        self._pool.follow(orders.plan)
        self._pool.drain(orders.drained, orders.lent)
        self._screening = Screening(lambda fingerprint: channel.send(Acquitted(fingerprint)))
        self._screening.follow(orders.quarantined)
        stall_timeout_s = settings.engine_stall_timeout_s
        self._attachments = Attachments(
            self._pool, self._screening, channel.send, self._lost, stall_timeout_s
        )
        attached = 0
        for slot in orders.slots:
            name = slot.shard
            shard = self._attachments.attach(slot, orders.resident[name], orders.granted[name])
            if shard is not None:
                attached += self._attachments.join(shard)
        if orders.slots and not attached:
            raise WorkerUnfit("no core answers")
        self._admission = Admission()
        self._tracing = Tracing(settings.otlp_endpoint)
        self._reporter = Reporter(lambda outcomes: channel.send(Ended(outcomes)))
        self._token_meter = TokenMeter(lambda tokens: channel.send(Used(tokens)))
        edge = Edge(
            self._admission,
            self._tracing,
            settings.default_unary_deadline_s,
            settings.default_stream_deadline_s,
            self._ended,
            running=metrics.inflight.track_inprogress,
        )
        card = model_card(settings, orders.model, orders.fingerprints, self._admission.limit)
        self._labels = AdapterLabels(orders.named)
        inference = Inference(self._pool, self._admission, card, self._labels)
        self._relay = Relay(orders.control_address, HOST_PATHS, edge)
        self._server = GatewayServer(edge, inference, settings, self._relay)
        self._tasks: list[asyncio.Task[None]] = []
        self._done = asyncio.Event()
        self._health_changed = asyncio.Event()

    def _ended(self, call: Call, code: str, end_s: float) -> None:
        """Note how a call ended: for metrics, and for the comparison of versions."""
        metrics.record(call, code, end_s)
        self._token_meter.count(call)
        # One that we ended ourselves, to drain for example, says nothing of its version.
        if call.version and call.cut_by is None:
            self._reporter.record(Outcome.of(call, code, end_s))

    async def start(self) -> None:
        """Take calls: bind, answer health with NOT_SERVING, warm up, then SERVING."""
        self._tasks.append(asyncio.create_task(self._follow()))  # the host may ask at once
        self._server.bind(self._orders.listen, self._orders.settings)
        await self._server.start()
        await self._attachments.warm_up()
        await self._server.health.serving(self._pool.stays_open)

    async def run(self) -> None:
        """Follow the host until it says Drain or is gone; then end everything.

        Raises the error of a task that failed: the host puts another worker in this one's place.
        """
        work = (
            self._watch(),
            self._attachments.watch(),
            self._tell_health(),
            self._reporter.run(),
            self._token_meter.run(),
            _until(self._done),
        )
        self._tasks += [asyncio.create_task(coroutine) for coroutine in work]
        try:
            ended, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._close()

    async def _follow(self) -> None:
        """Do what the host says, also while draining."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                match await self._channel.receive():
                    case Ask(ticket, ShardUp(slot, resident, granted)):
                        # Attached before the next message, which may be about this shard.
                        shard = self._attachments.attach(slot, resident, granted)
                        if shard is None:
                            self._channel.send(Answer(ticket))
                        else:
                            tasks.create_task(self._take_up(shard, ticket))
                    case Ask(ticket, question):
                        self._answer(ticket, question)
                    case Loaded(name, version):
                        if (residents := self._attachments.residents(name)) is not None:
                            residents.loaded(version)
                    case LoadFailed(name, key, reason):
                        if (residents := self._attachments.residents(name)) is not None:
                            residents.failed(key, reason)
                    case SlotGranted(name, key):
                        if (residents := self._attachments.residents(name)) is not None:
                            residents.slots.granted(key)
                    case SlotWithdrawn(name, key):
                        if (residents := self._attachments.residents(name)) is not None:
                            residents.slots.withdrawn(key)
                    case ShardDied(name, crashed, quarantined):
                        self._screening.follow(quarantined)  # before any of them is tried again
                        self._attachments.lose(name, crashed)
                    case NameAdapters(named):
                        self._labels.named = named
                    case Drain(delay_s, grace_s):
                        tasks.create_task(self._drain(delay_s, grace_s))
                    case None:  # the host is gone
                        self._done.set()
                        return

    def _answer(self, ticket: int, question: Question) -> None:
        match question:
            case ShowAdapter(tenant, adapter, served):
                self._view.show(tenant, adapter, served)
                self._channel.send(Answer(ticket))
            case FollowPlan(plan):
                self._pool.follow(plan)
                self._channel.send(Answer(ticket))
            case FollowDrains(shards, lent):
                self._pool.drain(shards, lent)
                self._health_changed.set()
                self._channel.send(Answer(ticket))
            case TellPlaced():
                placed = Placed(self._pool.in_flight, self._pool.placed)
                self._channel.send(Answer(ticket, placed))
            case Explain():
                self._channel.send(Answer(ticket, explain(self._pool, question)))
            case FollowQuarantine(quarantined):
                self._screening.follow(quarantined)
                self._channel.send(Answer(ticket))
            case Leave(shard, key):
                residents = self._attachments.residents(shard)
                if residents is None:  # the shard is gone, and the version with it
                    self._channel.send(Answer(ticket))
                else:
                    residents.leave(key, lambda: self._channel.send(Answer(ticket)))
            case RecallSlot(shard, key):
                residents = self._attachments.residents(shard)
                if residents is None:
                    self._channel.send(Answer(ticket))
                else:
                    residents.slots.recall(key, lambda: self._channel.send(Answer(ticket)))
            case TellUses(shard):
                residents = self._attachments.residents(shard)
                self._channel.send(Answer(ticket, {} if residents is None else residents.uses()))
            case AreYouThere():
                self._channel.send(Answer(ticket))
            case Flush():
                self._reporter.flush()
                self._channel.send(Answer(ticket))

    async def _take_up(self, shard: VllmShard, ticket: int) -> None:
        with contextlib.suppress(ShardUnavailable):  # it died again, and the host says so
            await shard.warm_up()
            if self._attachments.join(shard):
                self._health_changed.set()
        self._channel.send(Answer(ticket))

    def _lost(self, name: str) -> None:
        """A core is gone."""
        self._health_changed.set()
        # One that is blocked in a write does not see its engine's end.
        for call in self._admission.calls:
            if call.shard == name and call.first_token_s is not None:
                call.cut(ShardUnavailable(name))

    async def _tell_health(self) -> None:
        """Announce whether any shard is up, whenever that may have changed."""
        while True:
            await self._health_changed.wait()
            self._health_changed.clear()
            await self._server.health.serving(self._pool.stays_open)

    async def _drain(self, delay_s: float, grace_s: float) -> None:
        """Health first, then no new calls, then time for running ones."""
        try:
            self._server.health.drain()
            await asyncio.sleep(delay_s)  # load balancers need time to see it
            self._admission.close(Draining())
            self._admission.cut_all(Draining(), ENDLESS_METHODS)
            if not await self._admission.wait_idle(grace_s):
                self._admission.cut_all(Draining())
                await self._admission.wait_idle(CUT_TIMEOUT_S)
        finally:
            self._done.set()

    async def _close(self) -> None:
        await self._server.stop(CUT_TIMEOUT_S)
        self._reporter.flush()
        await self._relay.close()
        await self._attachments.close()
        await asyncio.to_thread(self._tracing.close)
        self._attachments.let_go()

    async def _watch(self) -> None:
        """Once a second: how late the loop was, and how many streams wait for their reader."""
        while True:
            lag_s = 0.0
            for _ in range(LAG_SAMPLES_PER_S):
                before_s = time.monotonic()
                await asyncio.sleep(1 / LAG_SAMPLES_PER_S)
                lag_s = max(lag_s, time.monotonic() - before_s - 1 / LAG_SAMPLES_PER_S)
            metrics.loop_lag.set(lag_s)
            now_s = time.monotonic()
            metrics.stalled_streams.set(
                sum(
                    call.writing_since_s is not None
                    and now_s - call.writing_since_s > STALLED_AFTER_S
                    for call in self._admission.calls
                )
            )


async def _until(event: asyncio.Event) -> None:
    await event.wait()
