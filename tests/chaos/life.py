"""One life: a cluster in memory, operators on it, and all that users, pods, networks and clocks can do to them."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from random import Random
from typing import Any

from sae_operator.api.resources import KINDS
from sae_operator.api.steps import Progress
from sae_operator.controller.app import Nature
from sae_operator.reconcile.names import LABEL_STEP
from tests.chaos.api_server import OURS, ApiServer, Object, ended_job, ended_pod, place_of
from tests.chaos.invariants import Invariants
from tests.chaos.operators import NAMESPACE, Processes, SimulatedOperator
from tests.chaos.results import ObjectStore
from tests.chaos.simulated_time import SimulatedLoop, rfc3339
from tests.chaos.transport import Gateway, share
from tests.chaos.workloads import Fate, Workloads

JOBS, CACHES, SWEEPS = "saetrainingjobs", "activationcaches", "saesweeps"
# Two operators never run longer together than a rollout takes.
SETTLE_SECONDS, LONGEST_SETTLING_SECONDS = 30.0, 3 * 3600.0
REST_SECONDS = 300.0

OUTCOMES: tuple[tuple[float, Fate], ...] = (
    (0.70, Fate()),
    (0.78, Fate(exit_code=1)),
    (0.83, Fate(exit_code=137, reason="OOMKilled")),
    (0.88, Fate(exit_code=143, disrupted=True)),
    (0.91, Fate(exit_code=2)),
    (0.95, Fate(message=False)),
    (1.00, Fate(runs=40.0)),
)
MOODS: dict[str, Callable[[float], Fate]] = {
    "fine": lambda chance: Fate(starts_after=0.1 + chance, runs=0.2 + 3 * chance),
    "mixed": lambda chance: next(fate for limit, fate in OUTCOMES if chance <= limit),
    "failing": lambda chance: Fate(exit_code=1),
    "out of memory": lambda chance: Fate(exit_code=137, reason="OOMKilled"),
    "wrong": lambda chance: Fate(exit_code=2),
    "long": lambda chance: Fate(runs=30 + 200 * chance),
    "no image": lambda chance: Fate(waits=("ImagePullBackOff", "not found")),
    "no node": lambda chance: Fate(waits=("Unschedulable", "0/1 nodes are available")),
}


class _Errors(logging.Handler):
    """Unexpected exceptions in an operator, which it logs and survives: each is a fault of its own."""

    def __init__(self, life: Life) -> None:
        super().__init__(logging.ERROR)
        self._life = life

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {record.exc_info[1]!r}"
        self._life.invariants.break_(f"an operator logged an error: {text}")


class Life:
    """Everything follows from `seed` and from what is called, whatever the process that runs it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.loop = SimulatedLoop()
        self.loop.set_exception_handler(self._failed)
        self.processes = Processes(self.loop)
        asyncio.set_event_loop(self.loop)
        self.random = Random(seed)
        self.server = ApiServer(self.random, lambda: rfc3339(self.loop.today()))
        self.server.refuses = self._refusal
        self.store = ObjectStore()
        self.invariants = Invariants(self.loop, self.server, self.store)
        self.workloads = Workloads(self.loop, self.server, self.store, seed, self._fate)
        self.operators: dict[int, tuple[SimulatedOperator, asyncio.Task[None]]] = {}
        self.mood = "fine"
        self.fault_rate = 0.0
        self.up = True
        self.quota_used_up = False
        # What the operators' nodes take for the time of day, in seconds from the true one.
        self.clock_error = 0.0
        self._numbers = itertools.count(1)
        self._errors = _Errors(self)
        self._log = logging.getLogger("sae_operator")
        self._level = self._log.level
        self._log.addHandler(self._errors)
        # That calls fail, and what pods complain of, is no news here.
        self._log.setLevel(logging.ERROR)

    def close(self) -> None:
        self._log.removeHandler(self._errors)
        self._log.setLevel(self._level)
        for number in list(self.operators):
            self.kill(number)
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
        asyncio.set_event_loop(None)

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception that nobody takes, in the cluster or in an operator."""
        self.invariants.break_(f"{context['message']}: {context.get('exception')!r}")

    # Time

    def wait(self, seconds: float) -> None:
        """Lets time pass, and checks what it brought."""
        self.loop.run_until_complete(asyncio.sleep(seconds))
        for number, (operator, task) in list(self.operators.items()):
            if operator.gateway.dead:
                self.kill(number)
            elif task.done():
                error = None if task.cancelled() else task.exception()
                self.invariants.break_(f"operator {number} has ended: {error!r}")
                del self.operators[number]
        self.invariants.check()

    def wait_until(self, holds: Callable[[], bool], seconds: float, every: float = SETTLE_SECONDS) -> bool:
        """Whether it held within `seconds`."""
        deadline = self.loop.time() + seconds
        while not holds():
            if self.loop.time() >= deadline:
                return False
            self.wait(every)
        return True

    # Operators

    def start_operator(self) -> int:
        number = next(self._numbers)
        gateway = Gateway(
            self.server,
            f"{self.seed}/{number}",
            available=lambda: self.up,
            fault_rate=lambda: self.fault_rate,
            tell=lambda line: self.invariants.note(f"[{number}] {line}"),
        )
        chance = Random(f"{self.seed}/{number}/chance")
        nature = Nature(self.loop.time, self._wrong_time, chance.uniform)

        async def run() -> None:
            operator = SimulatedOperator(self.loop, gateway, nature, number=number)
            self.operators[number] = operator, task
            await operator.run()

        task = self.processes.start(number, run)
        self.wait(0.0)
        self.invariants.note(f"operator {number} starts")
        return number

    def _wrong_time(self) -> datetime:
        return self.loop.today() + timedelta(seconds=self.clock_error)

    def kill(self, number: int) -> None:
        """As SIGKILL: what it has sent may have been done, and nothing more is."""
        operator, _ = self.operators.pop(number)
        operator.gateway.dead = True
        self.invariants.note(f"operator {number} is dead")
        self.processes.kill(number)

    def kill_at_call(self, number: int, call: int, *, before: bool) -> None:
        gateway = self.operators[number][0].gateway
        gateway.dies_at, gateway.dies_before = call, before

    # The network and the API server

    def go_away(self, seconds: float, *, expired: bool) -> None:
        """The API server is away; with `expired`, what happens meanwhile is told to no watch."""
        self.invariants.note(f"the API server is away for {seconds:g} s")
        self.up = False
        self.lose_watches(expired=expired)
        self.wait(seconds)
        self.up = True
        self.invariants.note("the API server is back")

    def lose_watches(self, *, expired: bool) -> None:
        for operator, _ in self.operators.values():
            operator.lose_watches(expired=expired)

    # Users

    def create(self, plural: str, name: str, spec: Object) -> None:
        if (plural, NAMESPACE, name) not in self.server.objects:
            self.invariants.note(f"a user creates {plural} {name}")
            self.server.create(plural, NAMESPACE, {"metadata": {"name": name}, "spec": spec})

    def edit(self, plural: str, name: str, change: Callable[[Object], Object]) -> None:
        """Patches the spec of a resource, if it is there."""
        found = self.server.objects.get((plural, NAMESPACE, name))
        if found is not None and "deletionTimestamp" not in found["metadata"]:
            patch = change(found["spec"])
            self.invariants.note(f"a user changes {plural} {name}: {patch}")
            self.server.merge(plural, NAMESPACE, name, {"spec": patch})

    def delete(self, plural: str, name: str, propagation: str = "Background") -> None:
        if (plural, NAMESPACE, name) in self.server.objects:
            self.invariants.note(f"a user deletes {plural} {name} ({propagation})")
            self.server.delete(plural, NAMESPACE, name, propagation=propagation)

    def delete_any(self, plural: str, chance: float, propagation: str) -> None:
        """Deletes one of the objects of a plural."""
        found = self.server.all(plural)
        if found:
            self.delete(plural, found[int(chance * len(found))]["metadata"]["name"], propagation)

    # Pods

    def set_mood(self, mood: str) -> None:
        self.mood = mood
        self.workloads.heal()

    def _fate(self, pod: Object) -> Fate:
        return MOODS[self.mood](share(self.seed, pod["metadata"]["name"]))

    def _refusal(self, plural: str, manifest: Object) -> str | None:
        return "exceeded quota: pods" if self.quota_used_up and plural == "jobs" else None

    async def answer_poll(self, session: object, address: str, port: int) -> Progress | str:
        """Instead of `GET /progress`."""
        await asyncio.sleep(0.005)
        pod = self.workloads.addresses.get(address)
        if pod is None:
            return f"GET /progress on {address}: no answer"
        step = pod["metadata"]["labels"][LABEL_STEP]
        counts = step in ("cache", "train")
        return Progress(
            step=step,
            tokens=int(self.loop.time()) if counts else 0,
            total_tokens=10**6 if counts else 0,
            updated_at=rfc3339(self.loop.today()),
        )

    # The end

    def settle(self) -> None:
        """Everything works again, one operator is left, all work is resumed; then all must come to rest."""
        self.invariants.note("settling")
        self.fault_rate, self.up, self.quota_used_up, self.clock_error = 0.0, True, False, 0.0
        self.set_mood("fine")
        for number in sorted(self.operators)[1:]:
            self.kill(number)
        for operator, _ in self.operators.values():
            operator.gateway.dies_at = None
        if not self.operators:
            self.start_operator()
        # A job that waits for a cache that does not exist waits for ever, and rightly.
        for name in self._missing_caches():
            self.create(CACHES, name, Specs.cache(shared=0))
        # A sweep resumes what it has suspended.
        for plural in (SWEEPS, JOBS, CACHES):
            for found in self.server.all(plural):
                if found["spec"].get("suspend"):
                    self.edit(plural, found["metadata"]["name"], lambda spec: {"suspend": False})
        if not self.wait_until(lambda: not self._unsettled(), LONGEST_SETTLING_SECONDS):
            self._fail(f"never settled: {self._unsettled()}")
        self.wait(60.0)
        self.invariants.check_settled()
        self._check_rest()
        self._check_memory()

    def _missing_caches(self) -> list[str]:
        names = {(job["spec"]["activations"].get("cacheRef") or {}).get("name") for job in self.server.all(JOBS)}
        there = {cache["metadata"]["name"] for cache in self.server.all(CACHES)}
        return sorted(name for name in names if name and name not in there)

    def _unsettled(self) -> list[str]:
        """But for jobs that wait for a cache of a user that has failed, which they do for ever."""
        failed = {c["metadata"]["name"] for c in self.server.all(CACHES) if c["status"].get("phase") == "Failed"}
        waiting = {
            job["metadata"]["name"]
            for job in self.server.all(JOBS)
            if (job["spec"]["activations"].get("cacheRef") or {}).get("name") in failed
        }
        return [text for text in self.invariants.unsettled() if text.split()[1] not in waiting]

    def _check_rest(self) -> None:
        before = dict(self.invariants.writes)
        self.wait(REST_SECONDS)
        after = dict(self.invariants.writes)
        if before != after:
            self._fail(f"writes at rest: {before} -> {after}")

    def _check_memory(self) -> None:
        """The operator knows what there is and nothing else, and no key or timer is left."""
        ((operator, _),) = self.operators.values()
        known = {uid for kind in KINDS for uid in operator.store.resource_uids(kind)}
        there = {found["metadata"]["uid"] for plural in OURS for found in self.server.all(plural)}
        if known != there:
            self._fail(f"the operator knows {known - there}, which are gone, and not {there - known}")
        jobs = {job["metadata"]["uid"] for job in self.server.all("jobs")}
        if set(operator.store.jobs()) != jobs:
            self._fail(f"the operator knows other Jobs than there are: {set(operator.store.jobs()) ^ jobs}")
        if operator.queue.pending:
            self._fail("keys wait in the queue")

    def _fail(self, text: str) -> None:
        self.invariants.break_(text)
        self.invariants.check()

    def unfinished(self, plural: str) -> list[Object]:
        ended = ended_job if plural == "jobs" else ended_pod
        return [found for found in self.server.all(plural) if not ended(found)]

    def places(self, plural: str) -> list[Any]:
        return [place_of(found) for found in self.server.all(plural)]


class Specs:
    """Small specs of resources that share caches and outputs in all ways."""

    @staticmethod
    def cache(shared: int, tokens: int = 300) -> Object:
        return {
            "model": {"name": "tiny"},
            "dataset": {"path": f"text-{shared}"},
            "hooks": [{"name": "model.layers.0"}],
            "contextSize": 16,
            "tokens": tokens,
            "storage": {"uri": "s3://saes/caches"},
            "parallelism": 2,
        }

    @staticmethod
    def job(name: str, activations: Object, *, tokens: int = 500, backoff_limit: int = 2) -> Object:
        return {
            "activations": activations,
            "saes": [{"name": "k16", "architecture": {"type": "topk", "k": 16}, "dSae": 64}],
            "training": {"tokens": tokens},
            "output": {"uri": f"s3://saes/out/{name}"},
            "run": {"backoffLimit": backoff_limit},
        }

    @staticmethod
    def sweep(name: str, values: list[int], *, per_job: int, at_once: int) -> Object:
        template = Specs.job(name, {"cache": Specs.cache(0)})
        return {
            "template": template,
            "space": Specs.space(values),
            "trialsPerJob": per_job,
            "maxParallel": at_once,
        }

    @staticmethod
    def space(values: list[int]) -> Object:
        return {"parameters": [{"path": "saes[0].architecture.k", "values": values}]}
