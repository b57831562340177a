"""Lives of resources on a real cluster: set up a namespace as a user would, apply, watch every state, wait for one."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.testbed.control_plane import ControlPlane
from tests.testbed.object_server import ObjectServer
from tests.testbed.waiting import wait_for


@contextmanager
def user_namespace(control_plane: ControlPlane, object_server: ObjectServer) -> Iterator[str]:
    """A namespace under PodSecurity `restricted`, with the store's Secret and, in its defaults, the store's address."""
    name = f"user-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    control_plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    control_plane.apply(
        [
            object_server.secret(name),
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "sae-operator-defaults", "namespace": name},
                "data": {"endpointUrl": object_server.endpoint},
            },
        ]
    )
    yield name
    control_plane.request("DELETE", f"/api/v1/namespaces/{name}")


def conditions(resource: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {condition["type"]: condition for condition in resource.get("status", {}).get("conditions", [])}


def is_current(resource: dict[str, Any]) -> bool:
    """Whether kstatus takes the resource for done: this generation is Ready, and neither Reconciling nor Stalled."""
    status = resource.get("status", {})
    if status.get("observedGeneration") != resource["metadata"]["generation"]:
        return False
    held = {name for name, condition in conditions(resource).items() if condition["status"] == "True"}
    return "Ready" in held and not held & {"Reconciling", "Stalled"}


@dataclass
class Life:
    """Every distinct state of one resource that was seen."""

    control_plane: ControlPlane
    namespace: str
    plural: str
    name: str
    states: list[dict[str, Any]] = field(default_factory=list)

    def look(self) -> dict[str, Any]:
        path = f"/apis/sae-operator.dev/v1alpha1/namespaces/{self.namespace}/{self.plural}/{self.name}"
        code, body = self.control_plane.request("GET", path)
        assert code == 200, body
        state = json.loads(body)
        if not self.states or self.states[-1]["metadata"]["resourceVersion"] != state["metadata"]["resourceVersion"]:
            self.states.append(state)
        return state

    def wait(self, what: str, holds: Callable[[dict[str, Any]], bool], seconds: float = 120) -> dict[str, Any]:
        """Look until a condition holds; tells the last status when it does not in time."""

        def seen() -> dict[str, Any] | None:
            state = self.look()
            return state if holds(state) else None

        def missing() -> str:
            status = json.dumps(self.states[-1].get("status"), indent=1) if self.states else "never seen"
            return f"{what} of {self.plural}/{self.name}; its status: {status}"

        state = wait_for(seen, seconds, what=missing)
        assert state is not None
        return state

    def wait_for_phase(self, *phases: str, seconds: float = 120) -> dict[str, Any]:
        return self.wait(f"phase {' or '.join(phases)}", lambda state: self.phase_of(state) in phases, seconds)

    @staticmethod
    def phase_of(state: dict[str, Any]) -> str | None:
        return state.get("status", {}).get("phase")

    @property
    def phases(self) -> list[str]:
        """Phases in the order in which they were seen, without repetition."""
        seen: list[str] = []
        for state in self.states:
            phase = self.phase_of(state)
            if phase and (not seen or seen[-1] != phase):
                seen.append(phase)
        return seen

    def jobs(self, step: str | None = None) -> list[dict[str, Any]]:
        """The resource's Jobs, of one step or all."""
        uid = self.look()["metadata"]["uid"]
        selector = f"sae-operator.dev/uid={uid}" + (f",sae-operator.dev/step={step}" if step else "")
        return self.control_plane.get("jobs", "-n", self.namespace, "-l", selector)["items"]
