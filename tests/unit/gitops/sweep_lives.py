"""Lives of sweeps: the sweep's reconcile is the product's; its training jobs and its report end as each life says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sae_operator.api.base import API_VERSION
from sae_operator.api.resources import SAE_SWEEP
from sae_operator.api.status import SAESweepStatus
from sae_operator.api.sweep import SAESweepSpec
from sae_operator.reconcile import projection
from sae_operator.reconcile.sweep import reconcile_sweep
from sae_operator.reconcile.sweep_observed import ObservedSweep, trial_job_facts
from sae_operator.reconcile.sweep_trials import outline
from sae_operator.reconcile.wanted import TrainingJobPatch
from tests.unit.gitops.lives import Version
from tests.unit.reconcile.fake_cluster import SETTINGS
from tests.unit.reconcile.specs import job_spec

SWEEP = SAE_SWEEP.kind
PATH = "saes[0].architecture.k"


def sweep_spec(*counts: int, **changes: Any) -> dict[str, Any]:
    """A sweep of k, one trial to a job, from a finished cache."""
    sae = {"name": "sae", "architecture": {"type": "topk", "k": 8}, "dSae": 64}
    template = job_spec({"uri": "s3://saes/caches/gpt2"}, saes=[sae], output={"uri": "s3://saes/sweeps/gpt2-k"})
    space = {"parameters": [{"path": PATH, "values": list(counts or (8, 16, 32))}]}
    return {"template": template, "space": space, "maxParallel": 2} | changes


@dataclass
class SweepLife:
    """One sweep.

    Attributes:
        jobs: its training jobs by name.
        reports: Jobs that write its report.
        failed: how often a training job has failed.
    """

    spec: Mapping[str, Any] = field(default_factory=sweep_spec)
    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: list[Version] = field(default_factory=list)
    failed: int = 0

    def __post_init__(self) -> None:
        self._uids = 0
        self.resource: dict[str, Any] = {
            "apiVersion": API_VERSION,
            "kind": SWEEP,
            "metadata": {"name": "gpt2-k", "namespace": "lab", "uid": self._uid(), "generation": 1},
            "spec": dict(self.spec),
            "status": {"observedGeneration": -1},
        }
        self._record("creation")

    # What a user does

    def edit(self, **changes: Any) -> None:
        self.resource["spec"] = self.resource["spec"] | changes
        self.resource["metadata"]["generation"] += 1
        self._record("edit")

    def edit_space(self, *counts: int) -> None:
        self.edit(space=sweep_spec(*counts)["space"])

    # What happens to its training jobs and its report

    @property
    def unfinished(self) -> list[str]:
        return [name for name, job in self.jobs.items() if job["status"].get("phase") not in ("Succeeded", "Failed")]

    def tell(self, name: str, phase: str) -> None:
        """A training job's status gets a phase."""
        job = self.jobs[name]
        k = job["spec"]["saes"][0]["architecture"]["k"]
        sae = {"name": job["spec"]["saes"][0]["name"], "phase": "Succeeded", "explainedVariance": 0.7, "l0": float(k)}
        words = {"Failed": "pod trial-0 ended with exit code 2"}.get(phase, phase)
        job["status"] = {
            "phase": phase,
            "observedGeneration": job["metadata"]["generation"],
            "saes": [sae] if phase == "Succeeded" else [],
            "conditions": [{"type": "Ready", "status": str(phase == "Succeeded"), "message": words}],
        }
        self.failed += phase == "Failed"

    def follow(self) -> None:
        """Training jobs take up what their spec says, as their own reconcile would."""
        for name in self.unfinished:
            suspended = self.jobs[name]["spec"].get("suspend")
            self.tell(name, "Suspended" if suspended else "Running")

    def end(self, phase: str, number: int = 1) -> None:
        """Some of the running training jobs end, and the operator looks."""
        for name in [name for name in self.unfinished if self.jobs[name]["status"].get("phase") == "Running"][:number]:
            self.tell(name, phase)
        self.look()

    def end_report(self, condition: str = "Complete") -> None:
        for job in self.reports.values():
            told = {"type": condition, "status": "True", "reason": "Tested", "lastTransitionTime": self._time()}
            job["status"].setdefault("conditions", [told])
        # A failed one is believed when its pods had time to say why.
        self.now += timedelta(seconds=60)
        self.look()

    def run(self) -> None:
        """To the end, without a failure."""
        for _ in range(40):
            if self.resource["status"].get("phase") in ("Succeeded", "Failed"):
                self.look()
                return
            self.end("Succeeded")
            self.end_report()
        raise AssertionError(self.resource["status"])

    # The operator's shell

    def look(self, times: int = 3) -> None:
        """The operator looks, and the training jobs follow what it has changed."""
        for _ in range(times):
            self._look()
            self.follow()
            self.now += timedelta(seconds=1)

    def _look(self) -> None:
        spec = SAESweepSpec.model_validate(self.resource["spec"])
        observed = ObservedSweep(
            metadata=projection.metadata(self.resource),
            spec=spec,
            status=SAESweepStatus.model_validate(self.resource["status"]),
            outline=outline(spec),
            training_jobs=tuple(trial_job_facts(job) for job in self.jobs.values()),
            jobs=tuple(projection.job_facts(job) for job in self.reports.values()),
        )
        wanted = reconcile_sweep(observed, SETTINGS, self.now)
        for patch in wanted.patch_training_jobs:
            self._patch(patch)
        for manifest in wanted.create:
            existing = {"Job": self.reports, "SAETrainingJob": self.jobs}.get(manifest["kind"], {})
            if manifest["metadata"]["name"] not in existing:
                raw = json.loads(json.dumps(manifest))
                raw["metadata"] |= {"uid": self._uid(), "generation": 1, "creationTimestamp": self._time()}
                existing[manifest["metadata"]["name"]] = raw | {"status": {}}
        if wanted.status != self.resource["status"]:
            self.resource["status"] = json.loads(json.dumps(wanted.status))
            self._record("operator")
        for name in wanted.delete_jobs:
            self.reports.pop(name, None)
        for name, _ in wanted.delete_training_jobs:
            self.jobs.pop(name, None)

    def _patch(self, patch: TrainingJobPatch) -> None:
        job = self.jobs[patch.name]
        for path, value in patch.changes:
            at = job["spec"]
            for part in path[:-1]:
                at = at.setdefault(part, {})
            at[path[-1]] = value
        annotations = job["metadata"]["annotations"] | dict(patch.annotations)
        job["metadata"]["annotations"] = {key: value for key, value in annotations.items() if value is not None}
        job["metadata"]["generation"] += 1
        if job["status"].get("phase") == "Failed" and any(path == ("retry",) for path, _ in patch.changes):
            job["status"] = {}

    def _record(self, written_by: str) -> None:
        self.versions.append(Version(copy.deepcopy(self.resource), written_by, self._done(), self.failed))

    def _done(self) -> bool:
        """Every trial of the space has ended, one at least well, and the report has been tried."""
        spec = SAESweepSpec.model_validate(self.resource["spec"])
        ended = {
            job["spec"]["saes"][0]["architecture"]["k"]: job["status"].get("phase")
            for job in self.jobs.values()
            if job["status"].get("phase") in ("Succeeded", "Failed")
        }
        asked = set(spec.space.parameters[0].values or ())
        reported = any(job["status"].get("conditions") for job in self.reports.values())
        return asked <= set(ended) and "Succeeded" in ended.values() and reported

    def _time(self) -> str:
        return self.now.strftime("%Y-%m-%dT%H:%M:%SZ")

    def _uid(self) -> str:
        self._uids += 1
        return f"{self._uids:08x}-0000-4000-8000-000000000000"


def _trains_all(sweep: SweepLife) -> None:
    sweep.look()
    sweep.run()


def _some_trials_fail_and_are_retried(sweep: SweepLife) -> None:
    sweep.look()
    sweep.end("Failed")
    sweep.run()
    sweep.edit(retry=1)
    sweep.look()
    sweep.run()


def _all_trials_fail(sweep: SweepLife) -> None:
    sweep.look()
    for _ in range(3):
        sweep.end("Failed")


def _all_trials_fail_and_are_retried(sweep: SweepLife) -> None:
    _all_trials_fail(sweep)
    sweep.edit(retry=1)
    sweep.look()
    sweep.run()


def _too_many_trials_fail(sweep: SweepLife) -> None:
    sweep.edit(maxFailedTrials=0)
    sweep.look()
    sweep.end("Failed")
    sweep.end("Succeeded")
    sweep.end_report()


def _the_report_fails(sweep: SweepLife) -> None:
    sweep.look()
    for _ in range(3):
        sweep.end("Succeeded")
    sweep.end_report("Failed")


def _is_suspended_and_resumed(sweep: SweepLife) -> None:
    sweep.look()
    sweep.end("Succeeded")
    sweep.edit(suspend=True)
    sweep.look()
    sweep.edit(suspend=False)
    sweep.look()
    sweep.run()


def _begins_suspended(sweep: SweepLife) -> None:
    sweep.edit(suspend=True)
    sweep.look()


def _its_space_grows_and_shrinks(sweep: SweepLife) -> None:
    sweep.look()
    sweep.edit_space(8, 16, 32, 64)
    sweep.look()
    sweep.run()
    sweep.edit_space(8, 16, 32, 48)
    sweep.look()
    sweep.run()


SweepStory = Callable[[SweepLife], None]
# Each with what kstatus says at its end.
SWEEP_LIVES: dict[SweepStory, str] = {
    _trains_all: "Current",
    _some_trials_fail_and_are_retried: "Current",
    _all_trials_fail: "Failed",
    _all_trials_fail_and_are_retried: "Current",
    _too_many_trials_fail: "Failed",
    _the_report_fails: "Current",
    _is_suspended_and_resumed: "Current",
    _begins_suspended: "InProgress",
    _its_space_grows_and_shrinks: "Current",
}


def lead_sweep(story: SweepStory) -> SweepLife:
    """A sweep after a life."""
    sweep = SweepLife()
    story(sweep)
    return sweep
