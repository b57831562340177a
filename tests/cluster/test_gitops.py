"""What GitOps tools see of our resources, on a real API server: kstatus in a watch, no drift, examples that apply."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sae_operator.api.base import API_VERSION
from sae_operator.api.manifest import read_yaml, validate_manifest
from sae_operator.api.resources import KINDS, Resource
from sae_operator.api.sweep_expansion import expand, pack
from tests.api_connection import ApiConnection
from tests.fake_kubelet import Ends, FakeKubelet, Runs, result, step_of, succeed
from tests.object_watch import ObjectWatch
from tests.operator_process import OperatorProcess, run_operator
from tests.operator_world import PLURALS, World, cache_spec, training_spec
from tests.testbed.control_plane import ControlPlane, KubectlError
from tests.testbed.paths import CHECKOUT
from tests.testbed.waiting import wait_for
from tests.unit.gitops.argo_cd import CUSTOMIZATIONS, act, action_scripts, health, health_script
from tests.unit.gitops.kstatus import kstatus

CACHE, JOB, SWEEP = "ActivationCache", "SAETrainingJob", "SAESweep"
EXAMPLES = CHECKOUT / "gitops" / "examples"
OVERLAYS = ("small", "full")
# The field manager of Argo CD's controller.
GIT_TOOL = "argocd-controller"
# What Argo CD puts on what it applies, and prunes by.
TRACKING = {
    "labels": {"app.kubernetes.io/instance": "experiments"},
    "annotations": {"argocd.argoproj.io/tracking-id": "experiments:sae-operator.dev/SAETrainingJob:saes/first"},
}


@pytest.fixture
def watches(world: World) -> Iterator[dict[str, ObjectWatch]]:
    """A watch of each kind, begun before anything is created."""
    with ExitStack() as stack:
        yield {kind: stack.enter_context(ObjectWatch(world.control_plane, world.namespace, kind)) for kind in KINDS}


def except_for(**behaviours: Any) -> Any:
    """A script: these steps do this, the others succeed."""
    return lambda pod: behaviours.get(step_of(pod)) or succeed(pod)


def sweep_spec(*counts: int) -> dict[str, Any]:
    """A sweep of k, one trial to a job, from a finished cache."""
    template = training_spec({"uri": "s3://bucket/cache"}, output={"uri": "s3://bucket/sweep"})
    space = {"parameters": [{"path": "saes[0].architecture.k", "values": list(counts)}]}
    return {"template": template, "space": space, "maxParallel": 2, "report": template["run"]["cpuSteps"]}


def story(versions: list[dict[str, Any]]) -> list[str]:
    """What kstatus says of each version, each once in a row."""
    told = [kstatus(version) for version in versions]
    return [status for i, status in enumerate(told) if i == 0 or told[i - 1] != status]


def judge(versions: list[dict[str, Any]]) -> None:
    """Rules for all versions of one object: nothing ends twice, changes are looked at first, and Argo CD agrees."""
    assert kstatus(versions[0]) == "InProgress", "a new resource is never current"
    by_kstatus = {"Current": "Healthy", "Failed": "Degraded", "InProgress": "Progressing"}
    for before, version in pairwise(versions):
        status, earlier = kstatus(version), kstatus(before)
        if version["metadata"]["generation"] != before["metadata"]["generation"]:
            assert status == "InProgress", f"a change is never taken for done: {version}"
        elif earlier in ("Current", "Failed"):
            assert status in (earlier, "Terminating"), f"what has ended changes although nobody asked for it: {version}"
        ends = {"Succeeded": "Current", "Ready": "Current", "Failed": "Failed"}
        if status not in ("Terminating", "InProgress"):
            assert ends[version["status"]["phase"]] == status
        if status != "Terminating":
            told = health(health_script(version["kind"]), version)["status"]
            paused = version["status"].get("phase") == "Suspended" and told == "Suspended"
            assert told == by_kstatus[status] or paused, (told, version)


class TestKstatusInAWatch:
    def test_a_training_job_and_its_cache_that_succeed_and_go_on(
        self, world: World, operator: OperatorProcess, kubelet: FakeKubelet, watches: dict[str, ObjectWatch]
    ) -> None:
        kubelet.scripts[world.namespace] = except_for(cache=Runs())
        world.create(JOB, "first", training_spec())
        name = world.wait_phase(JOB, "first", "WaitingForCache")["status"]["cacheName"]
        watches[CACHE].caught_up(world.wait_phase(CACHE, name, "Caching"))
        assert story(watches[CACHE].of(name)) == ["InProgress"]

        kubelet.scripts[world.namespace] = except_for(train=Runs())
        watches[JOB].caught_up(world.wait_phase(JOB, "first", "Running"))
        watches[CACHE].caught_up(world.wait_phase(CACHE, name, "Ready"))
        assert story(watches[CACHE].of(name)) == ["InProgress", "Current"]
        assert story(watches[JOB].of("first")) == ["InProgress"]

        # It does not end when it is suspended, and not when it is resumed.
        world.patch(JOB, "first", {"spec": {"suspend": True}})
        world.wait_phase(JOB, "first", "Suspended")
        world.patch(JOB, "first", {"spec": {"suspend": False}})
        watches[JOB].caught_up(world.wait_phase(JOB, "first", "Running"))
        assert story(watches[JOB].of("first")) == ["InProgress"]

        kubelet.scripts[world.namespace] = succeed
        watches[JOB].caught_up(world.wait_phase(JOB, "first", "Succeeded"))
        assert story(watches[JOB].of("first")) == ["InProgress", "Current"]

        # More tokens than it was trained on.
        kubelet.scripts[world.namespace] = except_for(train=Runs())
        edited = world.patch(JOB, "first", {"spec": {"training": {"tokens": 5000}}})
        assert kstatus(edited) == "InProgress"
        watches[JOB].caught_up(world.wait_phase(JOB, "first", "Running"))
        assert story(watches[JOB].of("first")) == ["InProgress", "Current", "InProgress"]
        kubelet.scripts[world.namespace] = succeed
        watches[JOB].caught_up(world.wait_phase(JOB, "first", "Succeeded"))
        assert story(watches[JOB].of("first")) == ["InProgress", "Current"] * 2

        # Settings of what is finished: seen, and nothing to do.
        world.patch(JOB, "first", {"spec": {"run": {"backoffLimit": 1}}})
        watches[JOB].caught_up(world.wait_phase(JOB, "first", "Succeeded"))
        assert story(watches[JOB].of("first")) == ["InProgress", "Current"] * 3

        # A second job extends the cache.
        kubelet.scripts[world.namespace] = except_for(
            cache=Runs(), finalize=Ends(message=result("finalize", shardsTotal=8, shardsComplete=8, tokens=2000))
        )
        more = training_spec({"cache": cache_spec(tokens=2000)}, output={"uri": "s3://bucket/second"})
        world.create(JOB, "second", more)
        watches[CACHE].caught_up(world.wait_phase(CACHE, name, "Caching"))
        assert story(watches[CACHE].of(name)) == ["InProgress", "Current", "InProgress"]
        kubelet.scripts[world.namespace] = except_for(
            finalize=Ends(message=result("finalize", shardsTotal=8, shardsComplete=8, tokens=2000))
        )
        watches[JOB].caught_up(world.wait_phase(JOB, "second", "Succeeded"))
        assert story(watches[JOB].of("second")) == ["InProgress", "Current"]
        for version in (*watches[JOB].of("first"), *watches[JOB].of("second")):
            assert version["status"].get("phase") != "Failed"
        for kind, names in ((JOB, ("first", "second")), (CACHE, (name,))):
            for found in names:
                judge(watches[kind].of(found))

    def test_what_fails_is_failed_until_it_is_retried(
        self, world: World, operator: OperatorProcess, kubelet: FakeKubelet, watches: dict[str, ObjectWatch]
    ) -> None:
        kubelet.scripts[world.namespace] = except_for(prepare=Ends(2), preflight=Runs())
        world.create(CACHE, "acts", cache_spec())
        world.create(JOB, "sae", training_spec({"cacheRef": {"name": "acts"}}))
        watches[CACHE].caught_up(world.wait_phase(CACHE, "acts", "Failed"))
        assert story(watches[CACHE].of("acts")) == ["InProgress", "Failed"]
        kubelet.scripts[world.namespace] = except_for(preflight=Ends(2))
        watches[JOB].caught_up(world.wait_phase(JOB, "sae", "Failed"))
        assert story(watches[JOB].of("sae")) == ["InProgress", "Failed"]
        kubelet.scripts[world.namespace] = except_for(cache=Runs())
        for kind, name in ((CACHE, "acts"), (JOB, "sae")):
            edited = world.patch(kind, name, {"spec": {"retry": 1}})
            assert kstatus(edited) == "InProgress"
        watches[CACHE].caught_up(world.wait_phase(CACHE, "acts", "Caching"))
        watches[JOB].caught_up(world.wait_phase(JOB, "sae", "WaitingForCache"))
        for kind, name in ((CACHE, "acts"), (JOB, "sae")):
            assert story(watches[kind].of(name)) == ["InProgress", "Failed", "InProgress"]
        kubelet.scripts[world.namespace] = succeed
        watches[JOB].caught_up(world.wait_phase(JOB, "sae", "Succeeded"))
        watches[CACHE].caught_up(world.wait_phase(CACHE, "acts", "Ready"))
        for kind, name in ((CACHE, "acts"), (JOB, "sae")):
            assert story(watches[kind].of(name)) == ["InProgress", "Failed", "InProgress", "Current"]
            judge(watches[kind].of(name))

    def test_a_sweep(
        self, world: World, operator: OperatorProcess, kubelet: FakeKubelet, watches: dict[str, ObjectWatch]
    ) -> None:
        watch = watches[SWEEP]
        kubelet.scripts[world.namespace] = except_for(preflight=Ends(2))
        world.create(SWEEP, "sweep", sweep_spec(1, 2))
        watch.caught_up(world.wait_phase(SWEEP, "sweep", "Failed"))
        assert story(watch.of("sweep")) == ["InProgress", "Failed"]

        kubelet.scripts[world.namespace] = except_for(train=Runs())
        assert kstatus(world.patch(SWEEP, "sweep", {"spec": {"retry": 1}})) == "InProgress"
        world.wait_phase(SWEEP, "sweep", "Running")
        world.patch(SWEEP, "sweep", {"spec": {"suspend": True}})
        world.wait_phase(SWEEP, "sweep", "Suspended")
        world.patch(SWEEP, "sweep", {"spec": {"suspend": False}})
        watch.caught_up(world.wait_phase(SWEEP, "sweep", "Running"))
        kubelet.scripts[world.namespace] = except_for(report=Runs())
        watch.caught_up(world.wait_phase(SWEEP, "sweep", "Reporting"))
        assert story(watch.of("sweep")) == ["InProgress", "Failed", "InProgress"]
        kubelet.scripts[world.namespace] = succeed
        watch.caught_up(world.wait_phase(SWEEP, "sweep", "Succeeded"))
        assert story(watch.of("sweep")) == ["InProgress", "Failed", "InProgress", "Current"]

        # Another trial.
        kubelet.scripts[world.namespace] = except_for(train=Runs())
        edited = world.patch(SWEEP, "sweep", {"spec": {"space": sweep_spec(1, 2, 3)["space"]}})
        assert kstatus(edited) == "InProgress"
        watch.caught_up(world.wait_phase(SWEEP, "sweep", "Running"))
        kubelet.scripts[world.namespace] = succeed
        watch.caught_up(world.wait_phase(SWEEP, "sweep", "Succeeded"))
        assert story(watch.of("sweep")) == ["InProgress", "Failed", "InProgress", "Current", "InProgress", "Current"]
        judge(watch.of("sweep"))
        for job in world.list(JOB):
            watches[JOB].caught_up(job)
        trained = {version["metadata"]["name"] for version in watches[JOB].versions}
        assert len(trained) == 3
        for name in trained:
            judge(watches[JOB].of(name))

    def test_what_is_being_deleted_is_terminating(
        self, world: World, operator: OperatorProcess, kubelet: FakeKubelet, watches: dict[str, ObjectWatch]
    ) -> None:
        kubelet.scripts[world.namespace] = except_for(preflight=Runs())
        world.create(JOB, "sae", training_spec())
        world.wait_phase(JOB, "sae", "Preflight")
        # As Argo CD deletes with its finalizer: children first.
        api = ApiConnection(world.control_plane)
        path = f"{PLURALS[JOB].format(world.namespace)}/sae"
        status, body = api.request("DELETE", path, {"propagationPolicy": "Foreground"})
        assert status == 200, body
        wait_for(lambda: "sae" in watches[JOB].deleted, 90, what="the job is gone")
        assert story(watches[JOB].of("sae")) == ["InProgress", "Terminating"]


def rendered(control_plane: ControlPlane, overlay: str) -> list[dict[str, Any]]:
    return read_yaml(control_plane.kubectl("kustomize", EXAMPLES / "experiments" / overlay))


class TestDrift:
    def apply(self, world: World, *manifests: dict[str, Any], manager: str = GIT_TOOL) -> None:
        text = "\n---\n".join(json.dumps(manifest) for manifest in manifests)
        world.control_plane.kubectl(
            "apply", "-n", world.namespace, "--server-side", f"--field-manager={manager}", "-f", "-", input=text
        )

    def dry_apply(self, world: World, manifest: dict[str, Any]) -> dict[str, Any]:
        """What applying a manifest again would lead to."""
        api = ApiConnection(world.control_plane)
        path = f"{PLURALS[manifest['kind']].format(world.namespace)}/{manifest['metadata']['name']}"
        query = f"?dryRun=All&fieldManager={GIT_TOOL}&force=true"
        status, body = api.request("PATCH", path + query, manifest, "application/apply-patch+yaml")
        assert status == 200, body
        return json.loads(body)

    def assert_no_drift(self, world: World, *manifests: dict[str, Any]) -> None:
        """As `kubectl diff --server-side` and Argo CD's server-side diff compare: all but what the server keeps."""
        for manifest in manifests:
            live = world.get(manifest["kind"], manifest["metadata"]["name"])
            assert live is not None
            assert without_bookkeeping(self.dry_apply(world, manifest)) == without_bookkeeping(live)
        assert self.diff(world, *manifests) == ""

    def diff(self, world: World, *manifests: dict[str, Any]) -> str:
        """`kubectl diff`, which ends with 1 when anything differs."""
        text = "\n---\n".join(json.dumps(manifest) for manifest in manifests)
        options = ("--server-side", "--force-conflicts", f"--field-manager={GIT_TOOL}")
        return world.control_plane.kubectl("diff", "-n", world.namespace, *options, "-f", "-", input=text)

    def assert_only_status_is_ours(self, live: dict[str, Any], *users: str) -> None:
        entries = live["metadata"]["managedFields"]
        others = {entry["manager"] for entry in entries if entry.get("subresource") != "status"}
        assert others == {GIT_TOOL, *users}
        (ours,) = [entry for entry in entries if entry.get("subresource") == "status"]
        assert set(ours["fieldsV1"]) == {"f:status"}
        assert "finalizers" not in live["metadata"]
        assert "ownerReferences" not in live["metadata"]

    def test_a_whole_life_changes_nothing_that_git_says(self, world: World, kubelet: FakeKubelet) -> None:
        manifests = [
            {
                "apiVersion": API_VERSION,
                "kind": kind,
                "metadata": {"name": name, **copy.deepcopy(TRACKING)},
                "spec": spec,
            }
            for kind, name, spec in (
                (CACHE, "acts", cache_spec(storage={"uri": "s3://bucket/own"})),
                (JOB, "first", training_spec()),
                (JOB, "reader", training_spec({"cacheRef": {"name": "acts"}}, output={"uri": "s3://bucket/reader"})),
                (SWEEP, "sweep", sweep_spec(1, 2, 3)),
            )
        ]
        kubelet.scripts[world.namespace] = except_for(train=Runs())
        with run_operator(world.control_plane.kubeconfig, namespace=world.namespace):
            self.apply(world, *manifests)
            for name in ("first", "reader"):
                world.wait_phase(JOB, name, "Running")
            # Both of its jobs train: no status changes any more while what is live is compared.
            world.wait_resource(SWEEP, "sweep", lambda found: found["status"]["trials"].get("running") == 2)
            self.assert_no_drift(world, *manifests)
            self.assert_children_have_no_tracking(world)
            kubelet.scripts[world.namespace] = succeed
            for name in ("first", "reader"):
                world.wait_phase(JOB, name, "Succeeded")
            world.wait_phase(SWEEP, "sweep", "Succeeded")
        with run_operator(world.control_plane.kubeconfig, namespace=world.namespace):
            # The restarted one has done its work when another job has gone through.
            world.create(JOB, "later", training_spec(output={"uri": "s3://bucket/later"}))
            world.wait_phase(JOB, "later", "Succeeded")
        self.assert_no_drift(world, *manifests)
        for manifest in manifests:
            live = world.get(manifest["kind"], manifest["metadata"]["name"])
            assert live is not None
            self.assert_only_status_is_ours(live)
            assert live["metadata"]["annotations"] == TRACKING["annotations"]
        # Applying it in earnest changes no spec either: nothing runs again.
        self.apply(world, *manifests)
        for manifest in manifests:
            live = world.get(manifest["kind"], manifest["metadata"]["name"])
            assert live is not None
            assert live["metadata"]["generation"] == 1

    def assert_children_have_no_tracking(self, world: World) -> None:
        """Argo CD prunes what carries an application's mark and is not in Git."""
        (inline,) = [found for found in world.list(CACHE) if found["metadata"]["name"] != "acts"]
        trials = [found for found in world.list(JOB) if found["metadata"]["name"] not in ("first", "reader")]
        assert len(trials) == 2
        kinds = ("Job", "Pod", "ConfigMap")
        children = [inline, *trials, *(child for kind in kinds for child in world.list(kind, ours=True))]
        assert len(children) > 20
        for child in children:
            meta = child["metadata"]
            assert meta["ownerReferences"], "children go with what they belong to"
            assert not set(TRACKING["labels"]) & set(meta["labels"])
            assert not set(TRACKING["annotations"]) & set(meta.get("annotations", {}))

    def test_actions_change_what_git_leaves_out(self, world: World, kubelet: FakeKubelet) -> None:
        manifest = {"apiVersion": API_VERSION, "kind": JOB, "metadata": {"name": "sae"}, "spec": training_spec()}
        kubelet.scripts[world.namespace] = except_for(preflight=Runs())
        with run_operator(world.control_plane.kubeconfig, namespace=world.namespace):
            self.apply(world, manifest)
            world.wait_phase(JOB, "sae", "Preflight")
            self.run_action(world, "suspend")
            suspended = world.wait_phase(JOB, "sae", "Suspended")
            self.assert_no_drift(world, manifest)
            self.assert_only_status_is_ours(suspended, "argocd-server")
            # A sync in between undoes nothing.
            self.apply(world, manifest)
            assert world.wait_phase(JOB, "sae", "Suspended")["spec"]["suspend"] is True
            kubelet.scripts[world.namespace] = except_for(preflight=Ends(2))
            self.run_action(world, "resume")
            world.wait_phase(JOB, "sae", "Failed")
            kubelet.scripts[world.namespace] = succeed
            self.run_action(world, "retry")
            job = world.wait_phase(JOB, "sae", "Succeeded")
            assert job["spec"]["retry"] == 1
            self.assert_no_drift(world, manifest)
            # What Git names is Git's: a sync undoes it, and the comparison says so before.
            named = {**manifest, "spec": {**manifest["spec"], "suspend": True}}
            with pytest.raises(AssertionError):
                self.assert_no_drift(world, named)
            with pytest.raises(KubectlError, match=r"[+]  suspend: true"):
                self.diff(world, named)

    def run_action(self, world: World, name: str) -> None:
        """As Argo CD's server does: the difference that the script has made, as a merge patch."""
        live = world.get(JOB, "sae")
        assert live is not None
        changed = act(action_scripts(JOB)[name], live)
        difference = {key: value for key, value in changed["spec"].items() if value != live["spec"].get(key)}
        assert set(difference) == {"retry" if name == "retry" else "suspend"}
        assert {**changed, "spec": None} == {**live, "spec": None}
        api = ApiConnection(world.control_plane)
        path = f"{PLURALS[JOB].format(world.namespace)}/sae?fieldManager=argocd-server"
        status, body = api.request("PATCH", path, {"spec": difference}, "application/merge-patch+json")
        assert status == 200, body


def without_bookkeeping(resource: dict[str, Any]) -> dict[str, Any]:
    """All of an object but what the API server keeps about it, and its status."""
    kept = ("managedFields", "resourceVersion")
    meta = {key: value for key, value in resource["metadata"].items() if key not in kept}
    return {**{key: value for key, value in resource.items() if key != "status"}, "metadata": meta}


class TestExamples:
    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_an_overlay_is_valid_here_and_in_the_cluster(
        self, control_plane: ControlPlane, crds: list[str], namespace: str, overlay: str
    ) -> None:
        manifests = rendered(control_plane, overlay)
        assert sorted(manifest["kind"] for manifest in manifests) == sorted(KINDS)
        for manifest in manifests:
            assert isinstance(validate_manifest(manifest), Resource)
        text = "\n---\n".join(json.dumps(manifest) for manifest in manifests)
        arguments = ("apply", "-n", namespace, "--server-side", "--dry-run=server", "--validate=strict", "-f", "-")
        assert control_plane.kubectl(*arguments, input=text).count("serverside-applied") == len(manifests)

    def test_names_of_caches_follow_a_prefix_and_images_the_registry(self, control_plane: ControlPlane) -> None:
        small = {found["kind"]: found for found in rendered(control_plane, "small")}
        for found in small.values():
            assert found["metadata"]["name"].startswith("small-")
        name = small[CACHE]["metadata"]["name"]
        assert small[JOB]["spec"]["activations"]["cacheRef"]["name"] == name
        assert small[SWEEP]["spec"]["template"]["activations"]["cacheRef"]["name"] == name
        full = {found["kind"]: found for found in rendered(control_plane, "full")}
        images = [found["spec"].get("template", found["spec"])["run"]["image"] for found in full.values()]
        assert set(images) == {"registry.example.com/sae-operator/job:0.1.0"}

    def test_the_sweep_trains_three_trials_from_each_read_of_the_cache(self, control_plane: ControlPlane) -> None:
        (manifest,) = [found for found in rendered(control_plane, "full") if found["kind"] == SWEEP]
        resource = validate_manifest(manifest)
        assert isinstance(resource, Resource)
        trials = expand(resource.spec)
        assert len(trials) == 12
        assert [len(job.trials) for job in pack(resource.spec, trials)] == [3, 3, 3, 3]

    def test_flux_and_argo_cd_are_given_folders_that_there_are(self) -> None:
        for name in ("wait-for-results", "wait-for-acceptance"):
            (flux,) = read_yaml((EXAMPLES / "flux" / f"{name}.yaml").read_text())
            assert (EXAMPLES / flux["spec"]["path"] / "kustomization.yaml").is_file()
            assert flux["spec"]["wait"] is True
            (source,) = read_yaml((EXAMPLES / "flux" / "source.yaml").read_text())
            assert flux["spec"]["sourceRef"] == {"kind": source["kind"], "name": source["metadata"]["name"]}
        (applications,) = read_yaml((EXAMPLES / "argo-cd" / "applicationset.yaml").read_text())
        (generator,) = applications["spec"]["generators"]
        taken, left_out = generator["git"]["directories"]
        folders = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob(taken["path"])}
        assert folders - {left_out["path"]} == {f"experiments/{overlay}" for overlay in OVERLAYS}
        assert left_out["exclude"] is True

    def test_a_generated_secret_is_named_by_what_uses_it(self, control_plane: ControlPlane, tmp_path: Path) -> None:
        base = EXAMPLES / "experiments" / "base"
        for path in base.iterdir():
            (tmp_path / path.name).write_text(path.read_text())
        kustomization = (tmp_path / "kustomization.yaml").read_text()
        kustomization += "secretGenerator:\n  - {name: s3, literals: [AWS_ACCESS_KEY_ID=a, AWS_SECRET_ACCESS_KEY=b]}\n"
        (tmp_path / "kustomization.yaml").write_text(kustomization)
        found = read_yaml(control_plane.kubectl("kustomize", tmp_path))
        (name,) = [item["metadata"]["name"] for item in found if item["kind"] == "Secret"]
        assert re.fullmatch(r"s3-[a-z0-9]{10}", name)
        used = re.findall(r"secretRef: *\{ *'?\"?name'?\"?: *'?\"?([^'\"}]+)", json.dumps(found).replace('"', ""))
        assert used == [name] * 3

    def test_argo_cds_settings_are_added_to_those_that_are_there(
        self, control_plane: ControlPlane, namespace: str
    ) -> None:
        there = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "argocd-cm", "namespace": namespace}}
        control_plane.apply({**there, "data": {"url": "https://argocd.example.com"}})
        path = CHECKOUT / "gitops" / "argo-cd" / "argocd-cm.yaml"
        command = next(line for line in path.read_text().splitlines() if "kubectl " in line).split()
        there_of = {"argocd": namespace, path.name: str(path)}
        control_plane.kubectl(*(there_of.get(argument, argument) for argument in command[2:]))
        data = control_plane.get("configmap", "argocd-cm", "-n", namespace)["data"]
        assert data.pop("url") == "https://argocd.example.com"
        assert data == read_yaml(path.read_text())[0]["data"]


class TestFluxExpressions:
    """CEL of the example, evaluated by the API server's CEL: as rules of a kind with our status and nothing else."""

    @pytest.fixture
    def expressions(self) -> dict[str, dict[str, str]]:
        (flux,) = read_yaml((EXAMPLES / "flux" / "wait-for-acceptance.yaml").read_text())
        found = {entry["kind"]: entry for entry in flux["spec"]["healthCheckExprs"]}
        assert {entry["apiVersion"] for entry in found.values()} == {API_VERSION}
        return found

    @pytest.mark.parametrize("kind", sorted(KINDS))
    def test_what_has_failed_is_failed_and_what_is_taken_up_is_current(
        self, control_plane: ControlPlane, namespace: str, expressions: dict[str, dict[str, str]], kind: str
    ) -> None:
        plural = KINDS[kind].plural
        (definition,) = read_yaml((CHECKOUT / "manifests" / "crds" / f"{plural}.yaml").read_text())
        names = f"{plural}.flux.example.com"
        definition["metadata"]["name"], definition["spec"]["group"] = names, "flux.example.com"
        definition["spec"]["names"].pop("shortNames")
        definition["spec"]["names"].pop("categories")
        (version,) = definition["spec"]["versions"]
        version["subresources"], version["additionalPrinterColumns"] = {}, []
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"]["spec"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        schema["x-kubernetes-validations"] = [
            {
                "rule": f"!({re.sub(r'(?<![.a-zA-Z])status[.]conditions', 'self.status.conditions', text)})",
                "message": what,
            }
            for what, text in expressions[kind].items()
            if what in ("failed", "current")
        ]
        control_plane.apply(definition)
        control_plane.kubectl("wait", "--for=condition=Established", "--timeout=120s", f"crd/{names}")
        path = f"/apis/flux.example.com/v1alpha1/namespaces/{namespace}/{plural}?dryRun=All"
        wait_for(lambda: control_plane.request("GET", path)[0] == 200, what="the kind is served")
        (tests,) = read_yaml((CUSTOMIZATIONS / kind / "health_test.yaml").read_text())
        answers = set()
        for case in tests["tests"]:
            (resource,) = read_yaml((CUSTOMIZATIONS / kind / case["inputPath"]).read_text())
            if resource["status"]["observedGeneration"] != resource["metadata"]["generation"]:
                # Flux compares these itself.
                continue
            sample = {**resource, "apiVersion": "flux.example.com/v1alpha1", "metadata": {"name": "sample"}}
            _, body = control_plane.request("POST", path, sample)
            true = {cause["message"] for cause in json.loads(body)["details"]["causes"]}
            expected = "failed" if case["healthStatus"]["status"] == "Degraded" else "current"
            assert {text.rpartition(": ")[2] for text in true} == {expected}, (case, true)
            answers.add(expected)
        assert answers == {"failed", "current"}
        control_plane.kubectl("delete", "crd", names, "--timeout=120s")
