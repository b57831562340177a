"""Wires the operator and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import uvloop

from sae_operator.api.base import API_VERSION
from sae_operator.api.resources import ACTIVATION_CACHE, KINDS, SAE_SWEEP, SAE_TRAINING_JOB
from sae_operator.controller import endpoints, logs, paths
from sae_operator.controller import heartbeat as heartbeats
from sae_operator.controller.census import Sweeper
from sae_operator.controller.client import ApiClient, ApiError, ServerUnavailable, connection_info
from sae_operator.controller.credentials import load_credentials
from sae_operator.controller.defaults import NamespaceDefaults
from sae_operator.controller.events import EventRecorder
from sae_operator.controller.executor import Executor
from sae_operator.controller.faults import CallFaults
from sae_operator.controller.framework import kopf
from sae_operator.controller.handlers import register
from sae_operator.controller.metrics import Metrics
from sae_operator.controller.observe import observe_cache, observe_sweep, observe_training_job
from sae_operator.controller.outlines import Outlines
from sae_operator.controller.progress import PodPoller
from sae_operator.controller.queue import Key, RetryAfter, WorkQueue
from sae_operator.controller.settings import configure
from sae_operator.controller.store import Store, StoredResource
from sae_operator.controller.watch import Watch
from sae_operator.reconcile.cache import reconcile_cache
from sae_operator.reconcile.names import OURS
from sae_operator.reconcile.observed import Defaults, InvalidSpec, OperatorSettings
from sae_operator.reconcile.sweep import reconcile_sweep
from sae_operator.reconcile.sweep_observed import is_at_rest
from sae_operator.reconcile.training_job import reconcile_training_job
from sae_operator.reconcile.wanted import Wanted

logger = logging.getLogger(__name__)

CRD_RETRY_SECONDS = 2.0
# For the calls that are under way when the operator is told to stop; most take milliseconds.
FINISH_SECONDS = 4.0
# A resource whose pods stay as they are is looked at only every third time that they are listed.
LOOKS_PER_POLL = 3
# With many resources whose pods work, the progress of each is written less often: so many statuses a second in all.
PROGRESS_PER_SECOND = 12.0
# Training jobs of a sweep change all the time: it is looked at once for all that happens within this.
SWEEP_SECONDS = 1.0
# Objects live long here or die at once; with Python's defaults, collections cost a tenth of the CPU.
GC_THRESHOLDS = (20_000, 20, 50)
# The API server takes values of a sweep that are nested up to 10,000 deep, and kopf reads them with Python's parser: if
# they are too deep for it, the watches of all end. A level takes some hundred bytes of the stack.
RECURSION_LIMIT = 20_000


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        namespace: the one that is served; all when None.
        lease_namespace: where the heartbeat's Lease lies; the served namespace, then the operator's own, when None.
        poll_seconds: time between two looks at running pods.
        progress_seconds: time between two updates of live progress in a status.
        result_grace_seconds: how long the message of a pod that has ended is waited for.
        liveness: where health is served, e.g. `http://0.0.0.0:8081/healthz`; not at all when None.
        metrics: where metrics are, e.g. `http://0.0.0.0:8082/metrics`, and `/readyz` beside them; the same.
        allowed_images, allowed_service_accounts, allowed_env, allow_trust_remote_code: see `OperatorSettings`.
    """

    job_image: str
    namespace: str | None = None
    kubeconfig: str | None = None
    lease_namespace: str | None = None
    liveness: str | None = None
    poll_seconds: float = 5.0
    progress_seconds: float = 10.0
    result_grace_seconds: float = 30.0
    metrics: str | None = None
    allowed_images: tuple[str, ...] = ()
    allowed_service_accounts: tuple[str, ...] = ()
    allowed_env: tuple[str, ...] = ()
    allow_trust_remote_code: bool = False


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Nature:
    """Time and chance, as the parts take them.

    Attributes:
        clock: seconds, from anywhere, that only grow.
        now: the time of day.
        uniform: a random number between two others.
    """

    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = _utc_now
    uniform: Callable[[float, float], float] = random.uniform


class Operator:
    """The parts, and what flows between them: events into the store, keys into the queue, `reconcile`, the executor."""

    def __init__(self, options: Options, *, client: ApiClient | None = None, nature: Nature | None = None) -> None:
        self._options = options
        self._nature = nature = nature or Nature()
        clock, now = nature.clock, nature.now
        self._load = functools.partial(load_credentials, options.kubeconfig)
        self._settings = OperatorSettings(
            job_image=options.job_image,
            poll_seconds=options.poll_seconds,
            progress_interval_seconds=options.progress_seconds,
            result_grace_seconds=options.result_grace_seconds,
            allowed_images=options.allowed_images,
            allowed_service_accounts=options.allowed_service_accounts,
            allowed_env=options.allowed_env,
            allow_trust_remote_code=options.allow_trust_remote_code,
        )
        self.metrics = Metrics(clock)
        own_namespace = options.lease_namespace or options.namespace or self._load().namespace
        self.client = client or ApiClient(self._load, faults=CallFaults.from_environment(), called=self.metrics.called)
        self.store = Store()
        self.outlines = Outlines()
        self.queue = WorkQueue(self.process, clock=clock, uniform=nature.uniform)
        self.defaults = NamespaceDefaults(self.client, clock=clock)
        events = EventRecorder(self.client, clock=clock, now=now)
        self.executor = Executor(self.client, self.store, events, self.look_at)
        self.poller = PodPoller(
            self.client,
            self.store,
            self.look_at,
            namespace=options.namespace,
            poll_seconds=options.poll_seconds,
            metrics=self.metrics,
            clock=clock,
        )
        self.sweeper = Sweeper(self.client, self.store, self.look_at, namespace=options.namespace, clock=clock)
        self.heartbeat = heartbeats.Heartbeat(self.client, namespace=own_namespace, clock=clock, now=now)
        # The first listing is over; another one is a relist.
        self._started = False
        self._stopping = False
        self._parts: list[asyncio.Task[None]] = []
        self.metrics.show(self)

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT; any part that fails ends all."""
        async with endpoints.serving(self._options.metrics, self.metrics.registry, self.not_ready):
            await self._run()

    async def _run(self) -> None:
        await self._wait_for_definitions()
        self._parts = [
            asyncio.create_task(self._work(), name="work"),
            asyncio.create_task(self.heartbeat.run(), name="heartbeat"),
            asyncio.create_task(self.watch_many(), name="watches of many objects"),
        ]
        watches = asyncio.create_task(self.watch(), name="watches")
        try:
            done, _ = await asyncio.wait([watches, *self._parts], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not (task.cancelled() and self._stopping):
                    task.result()
        finally:
            watches.cancel()
            await self.stop()
            await asyncio.gather(watches, return_exceptions=True)
            await self.client.close()

    async def process(self, key: Key) -> float | None:
        """One look at one resource."""
        await self.client.breaker.wait_closed()
        begun, result = time.perf_counter(), "error"
        try:
            after = await self._process(key)
            result = "ok"
            return after
        except RetryAfter as retry:
            result = "unavailable" if isinstance(retry.__cause__, ServerUnavailable) else "refused"
            raise
        finally:
            self.metrics.reconciled(key.kind, result, time.perf_counter() - begun)

    async def _process(self, key: Key) -> float | None:
        stored = self.store.get(key)
        if stored is None or stored.metadata.deleting:
            # Children go with their owner.
            self.poller.watch(key, False)
            self.queue.forget(key)
            return None
        logs.identify(stored.metadata.uid)
        try:
            await self.executor.look_up_told_job(stored)
            defaults = await self.defaults.of(key.namespace)
            # Last of what waits: a Job that ends meanwhile would be judged without the pods that ended it.
            await self.poller.list_due_pods(stored)
            stored = self.store.get(key)
            if stored is None:
                return None
            # The poller tells what changes; a look without a change only serves deadlines.
            settings = replace(
                self._settings,
                poll_seconds=LOOKS_PER_POLL * self.poller.interval,
                progress_interval_seconds=max(
                    self._settings.progress_interval_seconds, self.poller.watched / PROGRESS_PER_SECOND
                ),
            )
            now = self._nature.now()
            wanted = await self._reconcile(stored, defaults, settings, now)
            await self.executor.execute(stored, wanted)
        except ServerUnavailable as error:
            logger.info("waits: %s", error)
            raise RetryAfter(error.retry_after or self._nature.uniform(0.5, 1.5)) from error
        self.poller.watch(key, wanted.poll_pods)
        if wanted.poll_pods and wanted.requeue_after is not None and wanted.requeue_after < settings.poll_seconds:
            # It waits for something that ended pods say.
            self.store.children(stored.metadata.uid).pods_due = True
        return wanted.requeue_after

    async def _reconcile(
        self, stored: StoredResource, defaults: Defaults, settings: OperatorSettings, now: datetime
    ) -> Wanted:
        if stored.key.kind == ACTIVATION_CACHE.kind:
            return reconcile_cache(observe_cache(self.store, stored, defaults), settings, now)
        if stored.key.kind != SAE_SWEEP.kind:
            return reconcile_training_job(observe_training_job(self.store, stored, defaults), settings, now)
        spec, outline = self.store.spec_of(stored), None
        if not isinstance(spec, InvalidSpec) and not is_at_rest(stored.metadata, self.store.status_of(stored)):
            outline = await self.outlines.of(stored.metadata.uid, stored.metadata.generation, spec)
            latest = self.store.get(stored.key)
            if latest is None or latest.metadata != stored.metadata:
                # Nothing is made of a space that has been edited meanwhile.
                raise RetryAfter(0.0)
        return reconcile_sweep(observe_sweep(self.store, stored, outline, defaults), settings, now)

    def look_at(self, keys: Iterable[Key]) -> None:
        """Looks at what has changed, and soon at sweeps, of which as a rule a training job has."""
        for key in keys:
            if key.kind == SAE_SWEEP.kind:
                self.queue.add_within(key, SWEEP_SECONDS)
            else:
                self.queue.add(key)

    # What the watches call

    def resource_event(self, kind: str, event: Mapping[str, Any]) -> None:
        raw = event["object"]
        self._note_listing(event["type"])
        if event["type"] == "DELETED":
            key = Key(kind, raw["metadata"]["namespace"], raw["metadata"]["name"])
            self.look_at(self.store.drop_resource(raw["metadata"]["uid"]))
            self.outlines.forget(raw["metadata"]["uid"])
            self.queue.add(key)
            return
        keys = self.store.put_resource(kind, raw)
        if kind == SAE_SWEEP.kind:
            # Its own spec or status.
            for key in keys:
                self.queue.add(key)
        else:
            self.look_at(keys)

    def job_event(self, event: Mapping[str, Any]) -> None:
        raw = event["object"]
        self._note_listing(event["type"])
        if event["type"] == "DELETED":
            key = self.store.drop_job(raw["metadata"])
            if key is not None:
                self.queue.add(key)
            return
        key, changed = self.store.put_job(raw)
        if key is not None and changed:
            self.queue.add(key)
        if key is not None:
            # A pod that became ready shows in the Job before anything else tells of it.
            self.poller.hurry(key)

    def lease_event(self, event: Mapping[str, Any]) -> None:
        self.heartbeat.seen(event["object"])

    def login(self) -> kopf.ConnectionInfo:
        return connection_info(self._load())

    def probe(self) -> dict[str, float]:
        try:
            return self.heartbeat.check(self.queue.oldest_age())
        except heartbeats.Unhealthy as error:
            raise kopf.PermanentError(str(error)) from error

    # What the metrics show

    def not_ready(self) -> str | None:
        """Why the operator does not serve; None when it does."""
        if not self._started:
            return "not everything is listed yet"
        if self.client.breaker.open:
            return "the API server is away"
        if self.heartbeat.is_silent:
            return f"the heartbeat has not come back through the watch for {self.heartbeat.age:.0f} s"
        return None

    def ready(self) -> bool:
        return self.not_ready() is None

    def queue_depth(self) -> int:
        return self.queue.pending

    def oldest_key_seconds(self) -> float:
        return self.queue.oldest_age()

    def heartbeat_age_seconds(self) -> float:
        return self.heartbeat.age

    def breaker_open(self) -> bool:
        return self.client.breaker.open

    def phases(self) -> Mapping[tuple[str, str], int]:
        return self.store.phases()

    def active_jobs(self) -> Mapping[str, int]:
        return self.store.active_jobs()

    async def stop(self) -> None:
        """Ends everything but the watches; kopf, which is told to stop, waits five seconds for tasks that go on.

        What has been begun is finished, so that no call is cut off; while the API server is away, nothing can be.
        """
        self._stopping = True
        await self.queue.finish(0.0 if self.client.breaker.open else FINISH_SECONDS)
        for task in self._parts:
            task.cancel()
        await asyncio.gather(*self._parts, return_exceptions=True)

    # Parts

    def _note_listing(self, event_type: str | None) -> None:
        # Objects of a list come without a type.
        if event_type is None:
            self._relisted()

    def _relisted(self) -> None:
        if self._started:
            self.metrics.relisted()
            self.sweeper.relisted()

    async def watch_many(self) -> None:
        """Feeds in what happens to the kinds of which there may be thousands, until cancelled."""
        namespace, kind = self._options.namespace, SAE_TRAINING_JOB.kind
        take = functools.partial(self.resource_event, kind)
        async with asyncio.TaskGroup() as group:
            for path, selector, deliver in (
                (paths.resources(kind, namespace), "", take),
                (paths.jobs(namespace), OURS, self.job_event),
            ):
                group.create_task(Watch(self.client, path, selector, deliver, relisted=self._relisted).run())

    async def watch(self) -> None:
        """Feeds in what kopf's watches bring, until cancelled."""
        # kopf would ask for the name of the user, whom a container need not know.
        identity: Any = self.heartbeat.identity
        await kopf.operator(
            identity=identity,
            registry=register(kopf.OperatorRegistry(), self),
            settings=configure(kopf.OperatorSettings()),
            clusterwide=self._options.namespace is None,
            namespaces=[self._options.namespace] if self._options.namespace else [],
            liveness_endpoint=self._options.liveness,
            standalone=True,
        )

    async def _work(self) -> None:
        await self._retried(self.sweeper.wait_until_listed)
        self._started = True
        logger.info("Everything is listed: %d resources. Work begins.", len(self.store))
        async with asyncio.TaskGroup() as group:
            group.create_task(self.queue.run(), name="queue")
            group.create_task(self.poller.run(), name="pod poller")
            group.create_task(self.sweeper.run(), name="sweeper")

    async def _wait_for_definitions(self) -> None:
        """kopf looks once, at its start, which resources there are."""
        told = False
        while True:
            try:
                why = missing_definitions(await self.client.get(f"/apis/{API_VERSION}"))
                if not why:
                    return
            except ApiError as error:
                why = str(error)
            except ServerUnavailable as error:
                logger.warning("The API server does not answer: %s", error)
                why = ""
            if why and not told:
                logger.warning("The CustomResourceDefinitions are not installed yet (%s); waiting.", why)
                told = True
            await asyncio.sleep(CRD_RETRY_SECONDS)

    async def _retried(self, action: Any) -> None:
        while True:
            await self.client.breaker.wait_closed()
            try:
                return await action()
            except (ApiError, ServerUnavailable) as error:
                logger.warning("Listing failed: %s", error)
                await asyncio.sleep(self._nature.uniform(0.5, 1.5))


def missing_definitions(served: Mapping[str, Any]) -> str:
    """The plurals of our kinds that an API server's list of the group's resources lacks; they appear one by one."""
    names = {resource["name"] for resource in served.get("resources") or []}
    return ", ".join(kind.plural for kind in KINDS.values() if kind.plural not in names)


def run(options: Options) -> None:
    """Runs the operator in this process until it is told to stop; uvloop saves a sixth of its CPU."""
    sys.setrecursionlimit(RECURSION_LIMIT)
    uvloop.run(_run(options))


async def _run(options: Options) -> None:
    # What was imported stays: without it in sight, a collection costs a tenth.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    working = asyncio.create_task(Operator(options).run(), name="operator")
    # Until kopf takes them over. Process 1 of a container would go on otherwise.
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, working.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await working
