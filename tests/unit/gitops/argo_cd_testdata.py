"""Test data of Argo CD's health checks and actions, in its own form, from statuses that our reconciler writes.

    python -m tests.unit.gitops.argo_cd_testdata

writes `health_test.yaml`, `actions/action_test.yaml` and both `testdata` folders of each kind anew. They would go into
Argo CD's repository as they are.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sae_operator.api.manifest import validate_spec
from tests.unit.gitops.argo_cd import CUSTOMIZATIONS, patched
from tests.unit.gitops.lives import WatchedCluster, Weather
from tests.unit.gitops.sweep_lives import SWEEP, SweepLife
from tests.unit.reconcile.fake_cluster import CACHE, JOB, PodScript
from tests.unit.reconcile.specs import cache_spec, job_spec

ICONS = {"suspend": "fa fa-fw fa-pause", "resume": "fa fa-fw fa-play", "retry": "fa fa-fw fa-redo"}
UNSEEN = "waits for the operator to see this version of the spec"


@dataclass(frozen=True)
class Case:
    """One object, with the health that it should have and the actions that should be enabled.

    Attributes:
        make: the object.
        attention: condition whose message the health's message should end with.
    """

    name: str
    health: str
    actions: frozenset[str]
    make: Callable[[], dict[str, Any]]
    attention: str | None = None

    def message(self, resource: dict[str, Any]) -> str:
        """What the health should tell: that the spec is new, or where it stands and what needs attention."""
        status = resource["status"]
        if status["observedGeneration"] != resource["metadata"]["generation"]:
            return UNSEEN
        told = {condition["type"]: condition for condition in status["conditions"]}
        also = f"; {self.attention}: {told[self.attention]['message']}" if self.attention else ""
        phase = "" if self.health == "Suspended" else f"{status['phase']}: "
        return f"{phase}{told['Ready']['message']}{also}"


def _job(cluster: WatchedCluster, *phases: str) -> dict[str, Any]:
    return _at(cluster, JOB, "gpt2-l8", phases)


def _cache(cluster: WatchedCluster, *phases: str) -> dict[str, Any]:
    return _at(cluster, CACHE, "gpt2-text", phases)


def _at(cluster: WatchedCluster, kind: str, name: str, phases: tuple[str, ...]) -> dict[str, Any]:
    """The newest version of an object, once it is in one of these phases, with all defaults as the API server adds."""
    if phases:
        cluster.run_until(lambda: cluster.phase(kind, name) in phases)
    resource = copy.deepcopy(cluster.of(kind, name)[-1].resource)
    del resource["metadata"]["ownerReferences"]
    resource["spec"] = validate_spec(kind, resource["spec"]).to_manifest()
    return resource


def _with_job(weather: Callable[[str, int, int], PodScript] | None = None, **spec: Any) -> WatchedCluster:
    cluster = WatchedCluster(weather or Weather())
    cluster.create(JOB, "gpt2-l8", job_spec({"uri": "s3://saes/caches/gpt2"}, **spec))
    return cluster


def _with_cache(weather: Callable[[str, int, int], PodScript] | None = None, **spec: Any) -> WatchedCluster:
    cluster = WatchedCluster(weather or Weather())
    cluster.create(CACHE, "gpt2-text", cache_spec(**spec))
    return cluster


def _broken(step: str) -> Weather:
    return Weather(broken={step})


def _waiting(step: str, index: int, earlier: int) -> PodScript:
    return PodScript(unschedulable="0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")


def _without_image(step: str, index: int, earlier: int) -> PodScript:
    return PodScript(waits=("ErrImagePull", 'failed to pull image "registry/job:missing": not found'))


def _suspended_job() -> dict[str, Any]:
    cluster = _with_job()
    _job(cluster, "Running")
    cluster.edit(JOB, "gpt2-l8", suspend=True)
    return _job(cluster, "Suspended")


def _suspending_job() -> dict[str, Any]:
    cluster = _with_job()
    _job(cluster, "Running")
    cluster.edit(JOB, "gpt2-l8", suspend=True)
    cluster.reconcile_all()
    return _job(cluster)


def _job_with_more_tokens() -> dict[str, Any]:
    cluster = _with_job()
    _job(cluster, "Succeeded")
    cluster.edit(JOB, "gpt2-l8", training={"tokens": 4000})
    return _job(cluster)


def _job_with_a_failed_sae() -> dict[str, Any]:
    def script(step: str, index: int, earlier: int) -> PodScript:
        if step != "train":
            return PodScript()
        saes = (
            '{"name": "k16", "phase": "Succeeded", "explainedVariance": 0.8, "l0": 16.0},'
            ' {"name": "k32", "phase": "Failed", "message": "its loss was not finite at step 120"}'
        )
        return PodScript(message=f'{{"step": "train", "exitCode": 0, "reason": "Completed", "saes": [{saes}]}}')

    return _job(_with_job(script), "Succeeded")


def _retried(kind: str, name: str, cluster: WatchedCluster) -> dict[str, Any]:
    """Failed, and asked to run again, before the operator has seen that."""
    _at(cluster, kind, name, ("Failed",))
    cluster.edit(kind, name, retry=1)
    return _at(cluster, kind, name, ())


def _suspended_cache() -> dict[str, Any]:
    cluster = _with_cache()
    _cache(cluster, "Caching")
    cluster.edit(CACHE, "gpt2-text", suspend=True)
    return _cache(cluster, "Suspended")


def _extended_cache() -> dict[str, Any]:
    cluster = _with_cache()
    _cache(cluster, "Ready")
    cluster.edit(CACHE, "gpt2-text", tokens=900)
    return _cache(cluster)


def _sweep(*moments: str) -> dict[str, Any]:
    """A sweep after what has happened to it: a phase in which a training job ends, a report that ends, or an edit."""
    sweep = SweepLife()
    sweep.look()
    for moment in moments:
        match moment:
            case "suspend":
                sweep.edit(suspend=True)
                sweep.look()
            case "more trials":
                sweep.edit_space(8, 16, 32, 64)
            case "retry":
                sweep.edit(retry=1)
            case "report" | "no report":
                sweep.end_report("Complete" if moment == "report" else "Failed")
            case _:
                sweep.end(moment)
    resource = copy.deepcopy(sweep.versions[-1].resource)
    resource["spec"] = validate_spec(SWEEP, resource["spec"]).to_manifest()
    return resource


WELL, BADLY = ("Succeeded",), ("Failed",)
WORKING, PAUSED, FAILED, ENDED = (
    frozenset({"suspend"}),
    frozenset({"resume"}),
    frozenset({"retry"}),
    frozenset[str](),
)
CASES: dict[str, list[Case]] = {
    JOB: [
        Case("new", "Progressing", WORKING, lambda: _job(_with_job())),
        Case("unschedulable", "Progressing", WORKING, lambda: _unschedulable(_with_job(_waiting), JOB, "gpt2-l8")),
        Case("running", "Progressing", WORKING, lambda: _job(_with_job(), "Running")),
        Case("suspending", "Progressing", PAUSED, _suspending_job),
        Case("suspended", "Suspended", PAUSED, _suspended_job),
        Case("succeeded", "Healthy", ENDED, lambda: _job(_with_job(), "Succeeded")),
        Case("one-sae-failed", "Healthy", ENDED, _job_with_a_failed_sae, attention="SAEsFailed"),
        Case("more-tokens", "Progressing", ENDED, _job_with_more_tokens),
        Case("failed", "Degraded", FAILED, lambda: _job(_with_job(_broken("train")), "Failed")),
        Case("retried", "Progressing", ENDED, lambda: _retried(JOB, "gpt2-l8", _with_job(_broken("preflight")))),
    ],
    CACHE: [
        Case("new", "Progressing", WORKING, lambda: _cache(_with_cache())),
        Case("no-image", "Progressing", WORKING, lambda: _no_image(_with_cache(_without_image))),
        Case("caching", "Progressing", WORKING, lambda: _cache(_with_cache(), "Caching")),
        Case("suspended", "Suspended", PAUSED, _suspended_cache),
        Case("ready", "Healthy", ENDED, lambda: _cache(_with_cache(), "Ready")),
        Case("extended", "Progressing", ENDED, _extended_cache),
        Case("failed", "Degraded", FAILED, lambda: _cache(_with_cache(_broken("prepare")), "Failed")),
        Case("retried", "Progressing", ENDED, lambda: _retried(CACHE, "gpt2-text", _with_cache(_broken("cache")))),
    ],
    SWEEP: [
        Case("new", "Progressing", WORKING, lambda: SweepLife().resource),
        Case("running", "Progressing", WORKING, lambda: _sweep(*WELL)),
        Case("trial-failed", "Progressing", WORKING, lambda: _sweep(*BADLY), attention="TrialsFailed"),
        Case("reporting", "Progressing", WORKING, lambda: _sweep(*WELL * 3)),
        Case("suspended", "Suspended", PAUSED, lambda: _sweep(*WELL, "suspend")),
        Case("succeeded", "Healthy", ENDED, lambda: _sweep(*WELL * 3, "report")),
        Case(
            "succeeded-in-part",
            "Healthy",
            FAILED,
            lambda: _sweep(*BADLY, *WELL * 2, "report"),
            attention="TrialsFailed",
        ),
        Case("no-report", "Healthy", FAILED, lambda: _sweep(*WELL * 3, "no report"), attention="ReportFailed"),
        Case("more-trials", "Progressing", ENDED, lambda: _sweep(*WELL * 3, "report", "more trials")),
        Case("failed", "Degraded", FAILED, lambda: _sweep(*BADLY * 3), attention="TrialsFailed"),
        Case("retried", "Progressing", ENDED, lambda: _sweep(*BADLY * 3, "retry")),
    ],
}


def _unschedulable(cluster: WatchedCluster, kind: str, name: str) -> dict[str, Any]:
    cluster.run_until(lambda: cluster.condition(kind, name, "Unschedulable") is not None)
    return _at(cluster, kind, name, ())


def _no_image(cluster: WatchedCluster) -> dict[str, Any]:
    cluster.run_until(lambda: cluster.condition(CACHE, "gpt2-text", "ImagePullFailed") is not None)
    return _cache(cluster)


# Action -> the case that it is tried on, and what it sets.
ACTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "suspend": ("running", {"suspend": True}),
    "resume": ("suspended", {"suspend": False}),
    "retry": ("failed", {"retry": 1}),
}


def files_of(kind: str) -> dict[str, str]:
    """Path below the kind's folder -> text."""
    made = {case.name: case.make() for case in CASES[kind]}
    files = {f"testdata/{name}.yaml": _yaml(resource) for name, resource in made.items()}
    files["health_test.yaml"] = _yaml(
        {
            "tests": [
                {
                    "healthStatus": {"status": case.health, "message": case.message(made[case.name])},
                    "inputPath": f"testdata/{case.name}.yaml",
                }
                for case in CASES[kind]
            ]
        }
    )
    discoveries = [
        {
            "inputPath": f"testdata/{case.name}.yaml",
            "result": [
                {"name": name, "iconClass": icon, **({} if name in case.actions else {"disabled": True})}
                for name, icon in sorted(ICONS.items())
            ],
        }
        for case in CASES[kind]
    ]
    tests = []
    for action, (name, change) in ACTIONS.items():
        name = {"running": "caching"}.get(name, name) if kind == CACHE else name
        files[f"actions/testdata/{name}-{action}.yaml"] = _yaml(patched(made[name], **change))
        tests.append(
            {
                "action": action,
                "inputPath": f"testdata/{name}.yaml",
                "expectedOutputPath": f"testdata/{name}-{action}.yaml",
            }
        )
    for entry in [*discoveries, *tests]:
        name = Path(entry["inputPath"]).stem
        files[f"actions/testdata/{name}.yaml"] = files[f"testdata/{name}.yaml"]
    files["actions/action_test.yaml"] = _yaml({"discoveryTests": discoveries, "actionTests": tests})
    return files


def _yaml(document: dict[str, Any]) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.width = 4096
    stream = io.StringIO()
    yaml.dump(document, stream)
    return stream.getvalue()


def write() -> None:
    """Replaces the test data of all kinds."""
    for kind in CASES:
        folder, files = CUSTOMIZATIONS / kind, files_of(kind)
        for path in [*folder.glob("testdata/*.yaml"), *folder.glob("actions/testdata/*.yaml")]:
            path.unlink()
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


if __name__ == "__main__":
    write()
