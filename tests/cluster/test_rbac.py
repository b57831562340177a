"""The operator's rights, from the manifests' file: every one is needed, and no other is.

Every right is taken away once, in a namespace of its own with an operator that has all the others: what it is for then
fails, and the log says so. With all of them the API server refuses nothing, and its audit log shows what was used.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from ruamel.yaml import YAML

from sae_operator.controller.faults import ENV_EXIT_AT_CALL, EXIT_CODE
from tests.fake_kubelet import PLACEMENT, Behaviour, FakeKubelet, Runs, step_of, succeed
from tests.operator_process import OperatorProcess, start_operator
from tests.operator_world import PLURALS, World, cache_spec, training_spec
from tests.testbed.control_plane import ControlPlane, KubectlError
from tests.testbed.paths import CHECKOUT
from tests.testbed.waiting import wait_for

MANIFESTS = CHECKOUT / "manifests" / "operator"
ACCOUNT = "sae-operator"
OURS = "sae-operator.dev"
# Operators at a time; more only wait for each other on two cores.
AT_ONCE = 4
# An event that is told again is counted after a minute.
PROVOKED_SECONDS = 200.0


class Right(NamedTuple):
    """One right."""

    group: str
    resource: str
    verb: str

    def refusal(self) -> str:
        """What the API server says without it."""
        resource, _, subresource = self.resource.partition("/")
        named = f"{resource}/{subresource}" if subresource else resource
        return f'cannot {self.verb} resource "{named}" in API group "{self.group}"'


def documents(name: str) -> list[dict[str, Any]]:
    return [found for found in YAML(typ="safe").load_all((MANIFESTS / name).read_text()) if found]


def rules_of(kind: str) -> list[dict[str, Any]]:
    """Rules of the served namespaces (ClusterRole), and of the operator's own (Role)."""
    file = {"ClusterRole": "cluster_role.yaml", "Role": "role.yaml"}[kind]
    (role,) = [found for found in documents(file) if found["kind"] == kind]
    return role["rules"]


def rights_of(rules: list[dict[str, Any]]) -> list[Right]:
    return [
        Right(group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]


ALL_RULES = [*rules_of("ClusterRole"), *rules_of("Role")]
ALL_RIGHTS = sorted(rights_of(ALL_RULES))


def without(right: Right) -> list[dict[str, Any]]:
    """The rules but for one right."""
    kept: list[dict[str, Any]] = []
    for rule in copy.deepcopy(ALL_RULES):
        if right.group not in rule["apiGroups"] or right.resource not in rule["resources"]:
            kept.append(rule)
            continue
        others = [resource for resource in rule["resources"] if resource != right.resource]
        verbs = [verb for verb in rule["verbs"] if verb != right.verb]
        kept += [{**rule, "resources": others}] if others else []
        kept += [{**rule, "resources": [right.resource], "verbs": verbs}] if verbs else []
    return kept


@dataclass
class Place(World):
    """A namespace with a ServiceAccount of the operator, and a kubelet that obeys it."""

    kubelet: FakeKubelet
    kubeconfig: Any = None

    def pods(self, script: Callable[[dict[str, Any]], Behaviour]) -> None:
        self.kubelet.scripts[self.namespace] = script

    def start(self, *, kill: str | None = None) -> OperatorProcess:
        return start_operator(
            self.kubeconfig,
            namespace=self.namespace,
            poll_seconds=0.5,
            environment={ENV_EXIT_AT_CALL: kill} if kill else {},
        )


@contextmanager
def place(control_plane: ControlPlane, kubelet: FakeKubelet, rules: list[dict[str, Any]]) -> Iterator[Place]:
    """A namespace where the operator's ServiceAccount has these rights, by a Role alone."""
    name = f"rbac-{uuid.uuid4().hex[:10]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    named = {"namespace": name, "name": ACCOUNT}
    group = "rbac.authorization.k8s.io"
    made = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": named},
        {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": named, "rules": rules},
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": named,
            "roleRef": {"apiGroup": group, "kind": "Role", "name": ACCOUNT},
            "subjects": [{"kind": "ServiceAccount", **named}],
        },
    ]
    control_plane.apply(made)
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    wait_for(lambda: control_plane.request("GET", account)[0] == 200, what=f"the service account of {name}")
    found = Place(control_plane, name, kubelet)
    found.kubeconfig = control_plane.kubeconfig_for_service_account(name, ACCOUNT)
    try:
        yield found
    finally:
        control_plane.request("DELETE", f"/api/v1/namespaces/{name}")


def runs(step: str) -> Callable[[dict[str, Any]], Behaviour]:
    """Pods of one step run until they are told to end."""
    return lambda pod: Runs() if step_of(pod) == step else succeed(pod)


# What needs a right


def live(world: Place) -> OperatorProcess:
    """A job with an inline cache."""
    operator = world.start()
    world.create("SAETrainingJob", "job", training_spec())
    return operator


def train_together(world: Place) -> OperatorProcess:
    """Pods that find each other by a Service, and a clean-up after the end."""
    operator = world.start()
    run = {**PLACEMENT, "ttlSecondsAfterFinished": 1}
    world.create("SAETrainingJob", "job", training_spec(parallelism=2, run=run))
    return operator


def resume_after(call: str) -> Callable[[Place], OperatorProcess]:
    """An operator dies right after a call, and the next one finds what it has made; the defaults have changed."""

    def lead(world: Place) -> OperatorProcess:
        first = world.start(kill=f"{call}#1:after")
        world.create("SAETrainingJob", "job", training_spec(parallelism=2))
        assert first.wait() == EXIT_CODE, first.tail()
        defaults = {"metadata": {"name": "sae-operator-defaults"}, "data": {"region": "eu-test-1"}}
        world._call("POST", PLURALS["ConfigMap"].format(world.namespace), defaults)
        return world.start()

    return lead


def suspend(world: Place) -> OperatorProcess:
    world.pods(runs("preflight"))
    operator = live(world)
    wait_for(world.jobs, what=lambda: f"a Job:\n{operator.tail()}")
    world.patch("SAETrainingJob", "job", {"spec": {"suspend": True}})
    return operator


def lose_a_job(kind: str, step: str) -> Callable[[Place], OperatorProcess]:
    """Somebody deletes the Job of a step that runs."""

    def lead(world: Place) -> OperatorProcess:
        world.pods(runs(step))
        operator = world.start()
        spec = cache_spec() if kind == "ActivationCache" else training_spec()
        world.create(kind, "job", spec)

        def told() -> str | None:
            name = (world.status(kind, "job") or {}).get("jobName") or ""
            return name if f"-{step}-" in name else None

        name = wait_for(told, what=lambda: f"the Job of {step}:\n{operator.tail()}")
        assert name is not None
        world.delete("Job", name)
        return operator

    return lead


def refused_again_and_again(world: Place) -> OperatorProcess:
    """A Job that the API server does not take: told every 15 s, and counted after a minute."""
    operator = world.start()
    world.create("SAETrainingJob", "job", training_spec(run={**PLACEMENT, "podLabels": {"no such key": "x"}}))
    return operator


def sweep(world: Place, *, step: str | None = None) -> OperatorProcess:
    """A sweep of two trials, whose pods of `step` run until they are told to end."""

    if step is not None:
        world.pods(runs(step))
    operator = world.start()
    template = training_spec({"uri": "s3://bucket/cache"})
    spec = {"template": template, "space": space(1, 2), "report": PLACEMENT["cpuSteps"]}
    world.create("SAESweep", "sweep", spec)
    return operator


def space(*values: int) -> dict[str, Any]:
    return {"parameters": [{"path": "saes[0].architecture.k", "values": list(values)}]}


def change_a_sweep(changes: dict[str, Any]) -> Callable[[Place], OperatorProcess]:
    """A sweep is edited while its jobs train."""

    def lead(world: Place) -> OperatorProcess:
        operator = sweep(world, step="train")

        def all_train() -> bool:
            jobs = world.list("SAETrainingJob")
            return len(jobs) == 2 and all(job["status"].get("phase") == "Running" for job in jobs)

        wait_for(all_train, what=lambda: f"the sweep's jobs train:\n{operator.tail()}")
        world.patch("SAESweep", "sweep", {"spec": changes})
        return operator

    return lead


def lose_the_report(world: Place) -> OperatorProcess:
    operator = sweep(world, step="report")

    def told() -> str | None:
        return world.status("SAESweep", "sweep").get("jobName")

    name = wait_for(told, what=lambda: f"the report:\n{operator.tail()}")
    assert name is not None
    world.delete("Job", name)
    return operator


LIVES: dict[Right, Callable[[Place], OperatorProcess]] = {
    Right("", "services", "create"): train_together,
    Right("", "services", "delete"): train_together,
    Right("", "configmaps", "delete"): train_together,
    Right("", "services", "get"): resume_after("POST services"),
    Right("", "configmaps", "patch"): resume_after("POST configmaps"),
    Right("batch", "jobs", "delete"): suspend,
    Right("batch", "jobs", "get"): lose_a_job("SAETrainingJob", "preflight"),
    Right(OURS, "saetrainingjobs", "get"): lose_a_job("SAETrainingJob", "preflight"),
    Right(OURS, "activationcaches", "get"): lose_a_job("ActivationCache", "prepare"),
    Right("", "events", "patch"): refused_again_and_again,
    Right(OURS, "saesweeps/status", "patch"): sweep,
    Right(OURS, "saesweeps", "get"): lose_the_report,
    Right(OURS, "saetrainingjobs", "create"): sweep,
    Right(OURS, "saetrainingjobs", "patch"): change_a_sweep({"suspend": True}),
    Right(OURS, "saetrainingjobs", "delete"): change_a_sweep({"space": space(1)}),
}


def missed(control_plane: ControlPlane, kubelet: FakeKubelet, right: Right) -> str | None:
    """What went wrong with the proof that a right is needed; None when its lack was told."""
    with place(control_plane, kubelet, without(right)) as world:
        operator = LIVES.get(right, live)(world)
        try:
            wait_for(
                lambda: right.refusal() in operator.log.read_text(), PROVOKED_SECONDS, what="the refusal", interval=0.2
            )
        except TimeoutError:
            return operator.tail(20)
        else:
            return None
        finally:
            if operator.exit_code is None:
                operator.stop()


def test_with_all_rights_nothing_is_refused_and_lives_are_whole(
    control_plane: ControlPlane, crds: list[str], kubelet: FakeKubelet
) -> None:
    """In one namespace, by Roles alone."""
    with place(control_plane, kubelet, ALL_RULES) as world:
        operator = sweep(world)
        world.create("SAETrainingJob", "job", training_spec(parallelism=2))
        world.wait_phase("SAETrainingJob", "job", "Succeeded", timeout=120)
        world.wait_phase("SAESweep", "sweep", "Succeeded", timeout=120)
        assert operator.stop() == 0, operator.tail()
        asked = control_plane.audited(world.namespace, ACCOUNT)
    assert len(asked) > 50
    refused = [event["requestURI"] for event in asked if event.get("responseStatus", {}).get("code") in (401, 403)]
    assert not refused
    granted = {(right.group, right.resource, right.verb) for right in ALL_RIGHTS}
    used = {used_right(event) for event in asked if "objectRef" in event}
    assert used <= granted


def used_right(event: dict[str, Any]) -> tuple[str, str, str]:
    reference = event["objectRef"]
    parts = [reference["resource"], reference.get("subresource", "")]
    return reference.get("apiGroup", ""), "/".join(part for part in parts if part), event["verb"]


@pytest.mark.timeout(900)
def test_every_right_is_needed(control_plane: ControlPlane, crds: list[str], kubelet: FakeKubelet) -> None:
    # The longest one first.
    order = sorted(ALL_RIGHTS, key=lambda right: LIVES.get(right) is not refused_again_and_again)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip(order, pool.map(lambda right: missed(control_plane, kubelet, right), order), strict=True))
    unneeded = {right: log for right, log in found.items() if log is not None}
    assert not unneeded, "\n\n".join(f"{' '.join(right)} was not missed:\n{log}" for right, log in unneeded.items())


# Users

RESOURCES = ("activationcaches", "saesweeps", "saetrainingjobs")
READ = {"get", "list", "watch"}
WRITE = {"create", "update", "patch", "delete", "deletecollection"}
ROLES: dict[str, tuple[set[str], set[str]]] = {
    "view": (READ, set()),
    "edit": (READ | WRITE, set()),
    "admin": (READ | WRITE, {"get", "update", "patch"}),
}


@pytest.fixture(scope="module")
def aggregated(control_plane: ControlPlane, crds: list[str]) -> Iterator[None]:
    """Our roles, added to the cluster's."""
    roles = documents("aggregated_roles.yaml")
    control_plane.apply(roles)

    def added() -> bool:
        rules = control_plane.get("clusterrole", "admin")["rules"]
        return all(rule in rules for role in roles for rule in role["rules"])

    wait_for(added, 30, what="the rules are added to role admin, which has those of edit and view")
    yield
    for role in roles:
        control_plane.request("DELETE", f"/apis/rbac.authorization.k8s.io/v1/clusterroles/{role['metadata']['name']}")


def is_allowed(
    control_plane: ControlPlane, user: str, namespace: str, verb: str, resource: str, subresource: str = ""
) -> bool:
    asked = {"verb": verb, "group": OURS, "resource": resource, "subresource": subresource, "namespace": namespace}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "resourceAttributes": asked},
    }
    path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
    return json.loads(control_plane.request("POST", path, review)[1])["status"]["allowed"]


@pytest.mark.parametrize("role", ROLES)
def test_roles_of_a_namespace_hold_for_our_resources(
    control_plane: ControlPlane, aggregated: None, namespace: str, role: str
) -> None:
    user = f"{role}-of-{namespace}"
    control_plane.kubectl("create", "rolebinding", role, f"--clusterrole={role}", f"--user={user}", "-n", namespace)

    def may(verb: str, resource: str, subresource: str, where: str = namespace) -> bool:
        return is_allowed(control_plane, user, where, verb, resource, subresource)

    of_resource, of_status = ROLES[role]
    wait_for(lambda: may("get", "saesweeps", ""), what="the binding is known")
    for resource in RESOURCES:
        assert {verb for verb in READ | WRITE if may(verb, resource, "")} == of_resource
        assert {verb for verb in ("get", "update", "patch") if may(verb, resource, "status")} == of_status
        assert not may("get", resource, "", "default"), "another namespace"


def test_a_user_is_held_to_a_role_when_calling(control_plane: ControlPlane, aggregated: None, namespace: str) -> None:
    """By impersonation: a viewer sees, and does not change; an editor makes, and does not write a status."""
    for role, user in (("view", "viewr"), ("edit", "editr")):
        control_plane.kubectl("create", "rolebinding", role, f"--clusterrole={role}", f"--user={user}", "-n", namespace)
        wait_for(
            lambda user=user: is_allowed(control_plane, user, namespace, "get", "saetrainingjobs"),
            what=f"the binding of {user} is known",
        )
    manifest = {
        "apiVersion": f"{OURS}/v1alpha1",
        "kind": "SAETrainingJob",
        "metadata": {"name": "job", "namespace": namespace},
        "spec": training_spec(),
    }
    text, place = json.dumps(manifest), ("-n", namespace)
    with pytest.raises(KubectlError, match='User "viewr" cannot create resource "saetrainingjobs"'):
        control_plane.kubectl("create", "-f", "-", "--as=viewr", input=text)
    control_plane.kubectl("create", "-f", "-", "--as=editr", input=text)
    assert "job" in control_plane.kubectl("get", "saejobs", "--as=viewr", *place)
    patch = ("patch", "saejob", "job", "--type=merge", "-p")
    control_plane.kubectl(*patch, '{"spec":{"suspend":true}}', "--as=editr", *place)
    status = '{"status":{"phase":"Succeeded"}}'
    # kubectl looks before it patches.
    with pytest.raises(KubectlError, match=r'cannot (get|patch) resource "saetrainingjobs/status"'):
        control_plane.kubectl(*patch, status, "--subresource=status", "--as=editr", *place)
    control_plane.kubectl("delete", "saejob", "job", "--as=editr", *place)
