"""Listing the live pods of active Jobs, one LIST for all, and asking them how far they are."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import aiohttp

from sae_operator.api.redaction import redact
from sae_operator.api.steps import PROGRESS_PORT, Progress
from sae_operator.controller import paths
from sae_operator.controller.client import ApiClient, ApiError, ServerUnavailable
from sae_operator.controller.metrics import Metrics, gpus_of
from sae_operator.controller.pods import list_pods
from sae_operator.controller.queue import Key
from sae_operator.controller.store import Store, StoredResource
from sae_operator.reconcile import projection
from sae_operator.reconcile.names import LABEL_UID, OURS
from sae_operator.reconcile.observed import PodFacts

logger = logging.getLogger(__name__)

LIVE = "status.phase!=Succeeded,status.phase!=Failed"
POLL_TIMEOUT_SECONDS = 2.0
POLLS_AT_ONCE = 64
ANSWER_LIMIT_BYTES = 65536
# A tick that is asked for early waits until ticks take at most this share of the time.
LARGEST_SHARE = 0.03
SHORTEST_GAP_SECONDS = 0.5
# With many active Jobs each is looked at less often, so that polling never takes over.
SECONDS_PER_ACTIVE_KEY = 0.02
# A pod that no node takes is told within half a minute, however many there are.
LONGEST_INTERVAL_SECONDS = 25.0
# Of a Job whose pods all end at this moment each look sees some more.
LISTINGS_AT_ONCE = 3


class PodPoller:
    """Keeps pods and progress of the watched keys current, and tells `look_at` which of them changed."""

    def __init__(
        self,
        client: ApiClient,
        store: Store,
        look_at: Callable[[Iterable[Key]], None],
        *,
        namespace: str | None,
        poll_seconds: float,
        metrics: Metrics | None = None,
        progress_port: int = PROGRESS_PORT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._store, self._look_at, self._metrics = client, store, look_at, metrics or Metrics(clock)
        self._namespace, self._poll_seconds, self._port, self._clock = namespace, poll_seconds, progress_port, clock
        self._watched: set[Key] = set()
        self._soon = asyncio.Event()

    @property
    def interval(self) -> float:
        """Seconds between two ticks, when nothing asks for an earlier one."""
        by_number = min(SECONDS_PER_ACTIVE_KEY * len(self._watched), LONGEST_INTERVAL_SECONDS)
        return max(self._poll_seconds, by_number)

    @property
    def watched(self) -> int:
        """Resources whose pods matter now."""
        return len(self._watched)

    def gap_after(self, took: float) -> float:
        """Seconds without a tick after one of `took` seconds; a pod that does not answer never delays the next one."""
        return max(SHORTEST_GAP_SECONDS, min(took / LARGEST_SHARE, self.interval))

    def watch(self, key: Key, wanted: bool) -> None:
        """Whether the pods of `key` matter now."""
        if wanted and key not in self._watched:
            self._watched.add(key)
            self._soon.set()
        elif not wanted:
            self._watched.discard(key)

    def hurry(self, key: Key) -> None:
        """Something about the pods of `key` has changed."""
        if key in self._watched:
            self._soon.set()

    async def run(self) -> None:
        """Ticks until cancelled."""
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=POLL_TIMEOUT_SECONDS),
            connector=aiohttp.TCPConnector(limit=POLLS_AT_ONCE),
        ) as session:
            while True:
                await self._client.breaker.wait_closed()
                begun = self._clock()
                if not self._watched:
                    self._metrics.saw_gpus({})
                else:
                    self._soon.clear()
                    try:
                        await self._tick(session)
                    except (ApiError, ServerUnavailable) as error:
                        logger.warning("Pods could not be listed: %s", error)
                await asyncio.sleep(self.gap_after(self._clock() - begun))
                try:
                    await asyncio.wait_for(self._soon.wait(), max(self.interval - (self._clock() - begun), 0.0))
                except TimeoutError:
                    continue

    async def list_due_pods(self, stored: StoredResource) -> None:
        """Lists all pods of one resource where they are due, ended ones included: they hold the result. A pod that ends
        meanwhile, which the listing need not show, makes them due again."""
        family = self._store.children(stored.metadata.uid)
        for _ in range(LISTINGS_AT_ONCE):
            if not family.pods_due:
                return
            family.pods_due = False
            try:
                pods, version = await list_pods(self._client, stored)
            except BaseException:
                family.pods_due = True
                raise
            self._store.put_pods(stored.metadata.uid, pods, version)

    async def _tick(self, session: aiohttp.ClientSession) -> None:
        live: dict[str, list[PodFacts]] = defaultdict(list)
        gpus: Counter[str] = Counter()
        version = 0
        query = {"labelSelector": OURS, "fieldSelector": LIVE}
        uids = {stored.metadata.uid: key for key in self._watched if (stored := self._store.get(key))}
        async for page in self._client.pages(paths.pods(self._namespace), query):
            version = page.version
            for raw in page.items:
                uid = (raw["metadata"].get("labels") or {}).get(LABEL_UID)
                # Anybody can label a pod, but only in a namespace of theirs.
                if uid in uids and uids[uid].namespace == raw["metadata"]["namespace"]:
                    pod = projection.pod_facts(raw)
                    live[uid].append(pod)
                    if pod.running:
                        gpus[uids[uid].namespace] += gpus_of(raw)
        self._metrics.saw_gpus(gpus)
        changed: set[Key] = set()
        for uid, key in uids.items():
            if self._merge(uid, live.get(uid, []), version):
                changed.add(key)
        polls = [
            self._poll(session, uid, key, pod, changed)
            for uid, key in uids.items()
            for pod in live.get(uid, [])
            if pod.running and pod.ip
        ]
        await asyncio.gather(*polls)
        self._look_at(changed)

    def _merge(self, uid: str, live: list[PodFacts], version: int) -> bool:
        """Takes over the live pods. When one that was alive is not listed, it has ended: then all are to be listed."""
        family = self._store.children(uid)
        if version < family.pods_version:
            # Listed in full meanwhile.
            return False
        names = {pod.name for pod in live}
        if any(not pod.finished and pod.name not in names for pod in family.pods):
            family.pods_due = True
            return True
        return self._store.put_pods(uid, [*live, *(pod for pod in family.pods if pod.finished)], version)

    async def _poll(self, session: aiohttp.ClientSession, uid: str, key: Key, pod: PodFacts, changed: set[Key]) -> None:
        family = self._store.children(uid)
        answer = await ask(session, pod.ip or "", self._port)
        self._metrics.polled("ok" if isinstance(answer, Progress) else "failed")
        if isinstance(answer, Progress):
            family.unreachable.pop(pod.name, None)
            if family.progress.get(pod.name) != answer:
                family.progress[pod.name] = answer
                changed.add(key)
        elif family.unreachable.get(pod.name) != answer:
            family.unreachable[pod.name] = answer
            changed.add(key)


async def ask(session: aiohttp.ClientSession, ip: str, port: int) -> Progress | str:
    """A pod's progress, or why there is none."""
    host = f"[{ip}]" if ":" in ip else ip
    try:
        async with session.get(f"http://{host}:{port}/progress", allow_redirects=False) as response:
            if response.status != 200:
                return f"GET /progress on {ip}: HTTP {response.status}"
            body = bytearray()
            # A read returns what has arrived, which need not be all.
            async for part in response.content.iter_any():
                body += part
                if len(body) > ANSWER_LIMIT_BYTES:
                    break
    except TimeoutError:
        return f"GET /progress on {ip}: no answer within {POLL_TIMEOUT_SECONDS:g} s"
    except (aiohttp.ClientError, OSError) as error:
        return f"GET /progress on {ip}: {type(error).__name__}"
    said = projection.read_message(redact(body.decode(errors="replace")), Progress)
    return said if said is not None else f"GET /progress on {ip}: not a progress report"
