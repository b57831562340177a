"""100 lives on a real API server, whose operators are killed, work two at once and meet calls that go wrong, while
somebody deletes, suspends and retries, pods fail, and the API server is away for 5 s and for 60 s.

    SAE_CHAOS_SEED=7 python -m pytest tests/chaos/test_real_lives.py

The seed (1, or `random`) decides what is done and which calls go wrong; when it happens depends on the machine, so that
a failure may need a few runs to come again.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_operator.api.resources import KINDS
from sae_operator.controller.faults import ENV_FAULTS
from tests.chaos import seeds
from tests.chaos.observer import TERMINAL, Observer
from tests.fake_kubelet import RESULTS, Behaviour, Ends, FakeKubelet, step_of
from tests.operator_process import OperatorProcess, start_operator
from tests.operator_world import World, cache_spec, conditions, training_spec
from tests.testbed.control_plane import ControlPlane
from tests.testbed.paths import CHECKOUT
from tests.testbed.waiting import wait_for

LIVES = 100
AT_ONCE = 20
SEED = seeds.chosen()
NAMESPACE = "chaos"
FAULT_RATE = 0.1
WAVE_SECONDS, SETTLE_SECONDS = 15.0, 600.0
# After which wave the API server goes away, and for how long.
OUTAGES = {1: 5.0, 3: 60.0}
FATES = (
    (0.80, None),
    (0.90, Ends(1)),
    (0.95, Ends(137, reason="OOMKilled")),
    (1.00, Ends(2)),
)


def chance(*parts: object) -> float:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def fate(pod: dict[str, Any]) -> Behaviour:
    """Most pods do their work; one that fails is followed by another one with a fate of its own."""
    drawn = chance(SEED, pod["metadata"]["labels"]["sae-operator.dev/name"], pod["metadata"]["name"])
    ends = next(behaviour for limit, behaviour in FATES if drawn < limit)
    return ends or Ends(message=RESULTS[step_of(pod)])


def fine(pod: dict[str, Any]) -> Behaviour:
    return Ends(message=RESULTS[step_of(pod)])


class Operators:
    """At most two processes; each new one has other calls that go wrong."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane
        self._started = 0
        self.running: list[OperatorProcess] = []

    def start(self, *, faults: bool = True) -> None:
        self._started += 1
        environment = {ENV_FAULTS: f"{FAULT_RATE}:{SEED}-{self._started}"} if faults else {}
        self.running.append(
            start_operator(
                self._control_plane.kubeconfig, namespace=NAMESPACE, poll_seconds=1.0, environment=environment
            )
        )

    def kill(self) -> None:
        self.running.pop(0).kill()

    def check(self) -> None:
        """None has ended by itself, or met an exception that nothing expected."""
        for operator in self.running:
            assert operator.exit_code is None, operator.tail()
            # kopf calls it an error, too, that the API server is away.
            lines = operator.log.read_text().splitlines()
            unexpected = [line for line in lines if " ERROR " in line and " kopf." not in line]
            assert not unexpected, "\n".join(unexpected[:5])

    def stop(self) -> None:
        for operator in self.running:
            operator.kill()
        self.running.clear()


@pytest.fixture
def own_plane(tmp_path: Path) -> Iterator[ControlPlane]:
    """A control plane of its own, whose API server may be stopped."""
    with ControlPlane(tmp_path / "control-plane") as started:
        started.kubectl("apply", "--server-side", "-f", str(CHECKOUT / "manifests" / "crds"))
        started.kubectl("wait", "--for=condition=Established", "--timeout=120s", "crd", "--all")
        # The storage of a new kind answers 429 for a moment, which kubectl waits out.
        started.kubectl("get", ",".join(kind.plural for kind in KINDS.values()), "--all-namespaces")
        started.kubectl("create", "namespace", NAMESPACE)
        account = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/default"
        wait_for(lambda: started.request("GET", account)[0] == 200, what="the service account")
        yield started


def interfere(world: World, operators: Operators, random_: random.Random, names: list[str]) -> None:
    """Something that a user or a machine does."""
    name, what = random_.choice(names), random_.random()
    if what < 0.2:
        _delete_one(world, "Job", random_)
    elif what < 0.3:
        _delete_one(world, "Pod", random_)
    elif what < 0.35:
        _delete_one(world, "ConfigMap", random_)
    elif what < 0.5:
        world.patch("SAETrainingJob", name, {"spec": {"suspend": random_.random() < 0.5}})
    elif what < 0.6:
        retry = ((world.get("SAETrainingJob", name) or {}).get("spec") or {}).get("retry") or 0
        world.patch("SAETrainingJob", name, {"spec": {"retry": retry + 1}})
    elif what < 0.8 and len(operators.running) < 2:
        operators.start()
    elif operators.running:
        operators.kill()
        if not operators.running:
            operators.start()


def _delete_one(world: World, kind: str, random_: random.Random) -> None:
    found = world.list(kind, ours=True)
    if found:
        name = random_.choice(found)["metadata"]["name"]
        options = {"propagationPolicy": random_.choice(["Background", "Foreground"])}
        plural = {"Job": "/apis/batch/v1", "Pod": "/api/v1", "ConfigMap": "/api/v1"}[kind]
        path = f"{plural}/namespaces/{NAMESPACE}/{kind.lower()}s/{name}"
        assert world.control_plane.request("DELETE", path, options)[0] in (200, 202, 404)


def spec(number: int) -> dict[str, Any]:
    """Every third life has an inline cache, which it shares with others; the rest read a finished one."""
    output = {"uri": f"s3://bucket/out/{number}"}
    if number % 3:
        return training_spec({"uri": "s3://bucket/cache"}, output=output)
    return training_spec({"cache": cache_spec(dataset={"path": f"text-{number % 4}"})}, output=output)


@pytest.mark.timeout(1800)
def test_100_lives_on_a_real_api_server(own_plane: ControlPlane) -> None:
    print(f"SAE_CHAOS_SEED={SEED}")
    random_, world, operators = random.Random(SEED), World(own_plane, NAMESPACE), Operators(own_plane)
    observer = Observer(own_plane, NAMESPACE)
    observer.start()
    try:
        operators.start()
        for wave in range(LIVES // AT_ONCE):
            names = [f"life-{number}" for number in range(wave * AT_ONCE, (wave + 1) * AT_ONCE)]
            with FakeKubelet(own_plane, {NAMESPACE: fate}):
                for name in names:
                    world.create("SAETrainingJob", name, spec(int(name.removeprefix("life-"))))
                deadline = time.monotonic() + WAVE_SECONDS
                while time.monotonic() < deadline:
                    interfere(world, operators, random_, names)
            if wave in OUTAGES:
                go_away(own_plane, operators, OUTAGES[wave])
            operators.check()
        settle(own_plane, world, operators)
    finally:
        operators.stop()
        observer.stop()
    assert observer.seen > 10 * LIVES
    assert observer.violations == [], f"SAE_CHAOS_SEED={SEED}"


def go_away(own_plane: ControlPlane, operators: Operators, seconds: float) -> None:
    """The API server is away; every operator that runs then survives it."""
    own_plane.stop_api_server()
    time.sleep(seconds)
    operators.check()
    own_plane.start_api_server()


def settle(own_plane: ControlPlane, world: World, operators: Operators) -> None:
    """One operator without faults finishes everything; nothing is left behind."""
    operators.stop()
    operators.start(faults=False)
    with FakeKubelet(own_plane, {NAMESPACE: fine}):
        for job in world.list("SAETrainingJob"):
            if job["spec"].get("suspend"):
                world.patch("SAETrainingJob", job["metadata"]["name"], {"spec": {"suspend": False}})

        def unfinished() -> list[str]:
            found = [*world.list("SAETrainingJob"), *world.list("ActivationCache")]
            return [
                f"{item['metadata']['name']} {item['status'].get('phase')}: {conditions(item).get('Ready')}"
                for item in found
                if item["status"].get("phase") not in TERMINAL
                or item["status"]["observedGeneration"] != item["metadata"]["generation"]
            ]

        wait_for(lambda: not unfinished(), SETTLE_SECONDS, what=lambda: f"rest: {unfinished()[:5]}", interval=1.0)
        resources = {item["metadata"]["uid"] for item in world.list("SAETrainingJob")}
        assert len(resources) == LIVES
        resources |= {item["metadata"]["uid"] for item in world.list("ActivationCache")}

        def live_jobs() -> list[str]:
            return [name for name, job in world.jobs().items() if not (job.get("status") or {}).get("conditions")]

        wait_for(lambda: not live_jobs(), what=lambda: f"Jobs of finished resources: {live_jobs()}")
        for kind in ("Job", "ConfigMap"):
            for child in world.list(kind, ours=True):
                owners = {one["uid"] for one in child["metadata"].get("ownerReferences") or []}
                assert owners <= resources, child["metadata"]["name"]
                assert owners, child["metadata"]["name"]
        operators.check()
