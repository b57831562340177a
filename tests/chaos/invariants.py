"""What must hold at every write of a life, and what must hold when everything has settled."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from sae_operator.reconcile.names import ANNOTATION_WORK, LABEL_STEP, LABEL_UID
from tests.chaos.api_server import OURS, ApiServer, Object, Write, controller_uid, ended_job, ended_pod
from tests.chaos.results import ObjectStore
from tests.chaos.simulated_time import SimulatedLoop
from tests.unit.reconcile.fake_cluster import kstatus

DONE = frozenset({"Succeeded", "Ready"})
TERMINAL = DONE | {"Failed"}
CURRENT = {"Succeeded": "Current", "Ready": "Current", "Failed": "Failed"}
# So many writes within ten seconds by operators that have a few resources: something spins.
WINDOW_SECONDS, MOST_WRITES = 10.0, 400


class Violation(AssertionError):
    """A rule was broken; the message ends with the last calls."""


@dataclass
class Invariants:
    """Listens to all writes; a broken rule is kept, and raised by `check`, since a listener cannot fail a test."""

    loop: SimulatedLoop
    server: ApiServer
    store: ObjectStore
    trace: deque[str] = field(default_factory=lambda: deque(maxlen=400))
    broken: list[str] = field(default_factory=list)
    most_writes: int = MOST_WRITES
    # Writes by plural, of the operators alone: pods and the status of Jobs are not theirs.
    writes: Counter[str] = field(default_factory=Counter)
    _times: deque[float] = field(default_factory=deque)
    # Names of the running pods of each resource, with the Job of each.
    _running: dict[str, dict[str, str | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.server.listeners.append(self._wrote)

    def check(self) -> None:
        """Raises what was broken so far."""
        if self.broken:
            raise Violation("\n".join([*self.broken, "--- the last calls", *self.trace]))

    def note(self, line: str) -> None:
        self.trace.append(f"{self.loop.time():9.2f} {line}")

    def break_(self, text: str) -> None:
        self.broken.append(f"at {self.loop.time():.2f} s: {text}")

    def _wrote(self, write: Write) -> None:
        if write.plural in OURS:
            self._resource(write)
        elif write.plural == "jobs":
            self._job(write)
        elif write.plural == "pods":
            self._pod(write)
        if self._by_operator(write):
            self.writes[write.plural] += 1
            self._times.append(self.loop.time())
            while self._times[0] < self.loop.time() - WINDOW_SECONDS:
                self._times.popleft()
            if len(self._times) == self.most_writes:
                self.break_(f"{self.most_writes} writes in {WINDOW_SECONDS:g} s")

    def _by_operator(self, write: Write) -> bool:
        if write.plural in OURS:
            return write.before is not None and write.after is not None and _status_changed(write)
        return write.plural in ("configmaps", "services", "events") or (write.plural == "jobs" and write.before is None)

    # Jobs

    def _job(self, write: Write) -> None:
        job, name = write.object, write.place[2]
        if write.before is None:
            self.note(f"Job {name} made")
            owner = self._by_uid(controller_uid(job))
            if owner is None:
                # It was deleted a moment ago: the garbage collector takes the Job along.
                return
            siblings = [
                other
                for other in self.server.all("jobs")
                if controller_uid(other) == controller_uid(job) and other["metadata"]["uid"] != job["metadata"]["uid"]
            ]
            working = [other["metadata"]["name"] for other in siblings if not ended_job(other)]
            if working:
                self.break_(f"Job {name} was made while {working} works")
            if any(_succeeded(other) and _purpose(other) == _purpose(job) for other in siblings):
                self.break_(f"Job {name} runs a step again whose Job has succeeded and is still there")
        elif write.after is not None and ended_job(write.after) and not ended_job(write.before):
            kind = write.after["status"]["conditions"][0]["type"]
            self.note(f"Job {name} {kind}")
        elif write.after is None:
            self.note(f"Job {name} gone")

    def _pod(self, write: Write) -> None:
        pod = write.object
        phase = (pod["status"] or {}).get("phase")
        if write.before is not None and write.after is not None:
            if phase != (write.before["status"] or {}).get("phase"):
                self.note(f"pod {write.place[2]} {phase}")
            else:
                return
        if phase == "Running" and write.after is not None:
            running = self._running.setdefault(pod["metadata"]["labels"][LABEL_UID], {})
            running[pod["metadata"]["name"]] = controller_uid(pod)
            if len({*running.values()}) > 1:
                self.break_(f"pods {sorted(running)} of two Jobs run at once")
        else:
            self._running.get(pod["metadata"]["labels"][LABEL_UID], {}).pop(pod["metadata"]["name"], None)

    # Resources

    def _resource(self, write: Write) -> None:
        if write.before is None or write.after is None or not _status_changed(write):
            return
        old, new = write.before["status"], write.after["status"]
        name, spec = f"{write.after['kind']} {write.place[2]}", write.after["spec"]
        self.note(f"{name}: {old.get('phase')} -> {new.get('phase')}, {_ready(new)}")
        if old.get("phase") in TERMINAL and new.get("phase") != old["phase"] and not _asks_for_more(write.after, old):
            self.break_(f"{name} was {old['phase']} and became {new.get('phase')} without being asked for anything")
        if old.get("phase") in TERMINAL and new.get("phase") == old["phase"] and not new.get("completionTime"):
            self.break_(f"{name} lost its completion time")
        phase = new.get("phase")
        told = kstatus(write.after["metadata"]["generation"], new)
        invalid = any(item["type"] == "Invalid" and item["status"] == "True" for item in new.get("conditions") or [])
        if new.get("observedGeneration") == write.after["metadata"]["generation"] and not invalid:
            expected = CURRENT.get(phase, "InProgress")
            if told != expected:
                self.break_(f"{name} is {phase}, and kstatus takes it for {told}")
        if phase == "Succeeded" and write.plural == "saetrainingjobs":
            trained = self.store.outputs.get(spec["output"]["uri"], 0)
            if trained < (new.get("observedTokens") or 0) and not _follows(spec):
                self.break_(f"{name} succeeded, and was trained on {trained} tokens")
        if phase == "Ready" and self.store.rows.get(new["manifestUri"].removesuffix("/manifest.json"), 0) < (
            new.get("observedTokens") or 0
        ):
            self.break_(f"{name} is Ready, and its rows are not there")

    def _by_uid(self, uid: str | None) -> Object | None:
        return next((found for found in self.server.objects.values() if found["metadata"]["uid"] == uid), None)

    # In the end

    def unsettled(self) -> list[str]:
        """What is not at rest."""
        told: list[str] = []
        for plural in sorted(OURS):
            for found in self.server.all(plural):
                status, meta = found["status"], found["metadata"]
                suspended = status.get("phase") == "Suspended"
                if status.get("observedGeneration") != meta["generation"]:
                    told.append(f"{found['kind']} {meta['name']}: generation {meta['generation']} was not seen")
                elif status.get("phase") not in TERMINAL and not suspended:
                    told.append(f"{found['kind']} {meta['name']} is {status.get('phase')}: {_ready(status)}")
        return told

    def check_settled(self) -> None:
        """Raises what is left that should not be."""
        there = {found["metadata"]["uid"]: found for found in self.server.objects.values()}
        for (plural, _, name), found in sorted(self.server.objects.items()):
            owners = [one["uid"] for one in found["metadata"].get("ownerReferences") or []]
            lost = [uid for uid in owners if uid not in there]
            if plural not in OURS | {"events", "leases"} and not owners:
                self.break_(f"{plural} {name} belongs to nothing")
            if lost:
                self.break_(f"{plural} {name} belongs to what does not exist")
            if "deletionTimestamp" in found["metadata"]:
                self.break_(f"{plural} {name} is still being deleted")
        for job in self.server.all("jobs"):
            owner = there.get(controller_uid(job) or "")
            if owner is not None and not ended_job(job) and owner["status"].get("phase") in TERMINAL | {"Suspended"}:
                self.break_(f"Job {job['metadata']['name']} works for a resource at rest")
        for pod in self.server.all("pods"):
            if not ended_pod(pod):
                self.break_(f"pod {pod['metadata']['name']} is {pod['status'].get('phase')}")
        self.check()


def _status_changed(write: Write) -> bool:
    assert write.before is not None
    assert write.after is not None
    return write.before["status"] != write.after["status"]


def _ready(status: Object) -> str:
    found = [item for item in status.get("conditions") or [] if item["type"] == "Ready"]
    return f"{found[0]['reason']}: {found[0]['message']}" if found else ""


def _purpose(job: Object) -> tuple[str, str]:
    """The step and the round of work."""
    return job["metadata"]["labels"][LABEL_STEP], (job["metadata"].get("annotations") or {}).get(ANNOTATION_WORK, "")


def _succeeded(job: Object) -> bool:
    return any(item["type"] == "Complete" for item in job["status"].get("conditions") or [])


def _follows(spec: Object) -> bool:
    """Trains on all that its cache has: `observedTokens` is 0 or the cache's."""
    return not (spec.get("training") or {}).get("tokens")


def _asks_for_more(resource: Object, status: Object) -> bool:
    """Whether a finished resource was asked for a new round."""
    spec = resource["spec"]
    if resource["kind"] == "SAESweep":
        # In many ways; all of them change the spec.
        return status.get("observedGeneration") != resource["metadata"]["generation"]
    if status["phase"] == "Failed" and spec.get("retry", 0) > (status.get("observedRetry") or 0):
        return True
    source: Any = spec.get("activations") or {}
    inline = source.get("cache") or source.get("live") or {}
    asked = spec.get("tokens") or (spec.get("training") or {}).get("tokens") or inline.get("tokens") or 0
    hooks = {hook["name"] for hook in spec.get("hooks") or []}
    return asked > (status.get("observedTokens") or 0) or not hooks <= set(status.get("observedHooks") or hooks)
