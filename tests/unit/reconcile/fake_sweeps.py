"""A sweep in memory: it applies what the reconcile wants, and tests say how its training jobs and its report fare.

Rules that must hold at every moment are checked at every look: kstatus, `maxParallel`, no trial in two jobs, a status
of at most 16 KiB, and no report before all has ended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sae_operator.api.status import SAESweepStatus
from sae_operator.api.steps import SweepStep
from sae_operator.api.sweep import SAESweepSpec
from sae_operator.api.sweep_expansion import SweepInvalid
from sae_operator.controller.executor import changes_of
from sae_operator.controller.merge import merge_patch
from sae_operator.reconcile import projection
from sae_operator.reconcile.names import is_controlled_by
from sae_operator.reconcile.observed import Defaults, InvalidSpec, OperatorSettings, SpecProblem
from sae_operator.reconcile.sweep import reconcile_sweep
from sae_operator.reconcile.sweep_observed import ObservedSweep, is_at_rest, sweep_of, trial_job_facts
from sae_operator.reconcile.sweep_trials import Outline, outline
from sae_operator.reconcile.wanted import TrainingJobPatch, Wanted
from tests.unit.reconcile.fake_cluster import Died, kstatus
from tests.unit.reconcile.specs import job_spec

NAME, UID, NAMESPACE = "sweep", "0f0f0f0f-0000-4000-8000-000000000000", "lab"
SETTINGS = OperatorSettings(job_image="sae-job:test")
STATUS_LIMIT = 16 * 1024
K_PATH = "saes[0].architecture.k"


def template(**changes: Any) -> dict[str, Any]:
    """One SAE, trained on a finished cache."""
    sae = {"name": "topk", "architecture": {"type": "topk", "k": 16}, "dSae": 64}
    return job_spec({"uri": "s3://saes/cache"}, saes=[sae]) | changes


def sweep_spec(counts: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    """A sweep of k, one trial for each."""
    return {"template": template(), "space": k_space(counts or [1, 2, 3, 4, 5, 6])} | changes


def k_space(counts: list[int]) -> dict[str, Any]:
    return {"parameters": [{"path": K_PATH, "values": counts}]}


def merged(old: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """A document after a merge patch (RFC 7386)."""
    result = dict(old)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            before = result.get(key)
            result[key] = merged(before if isinstance(before, Mapping) else {}, value)
        else:
            result[key] = value
    return result


@dataclass
class FakeSweep:
    """Attributes:
    jobs: raw SAETrainingJobs by name.
    reports: raw Jobs of the report.
    created, patched, deleted: names of training jobs, in the order of the calls.
    failed_among_others: UID of a job that has succeeded, and name of an SAE that failed there; others may have it, too.
    die_after: number of the operator's call after which it ends.
    """

    spec: dict[str, Any] = field(default_factory=sweep_spec)
    defaults: Defaults = field(default_factory=Defaults)
    settings: OperatorSettings = SETTINGS
    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    generation: int = 1
    status: dict[str, Any] = field(default_factory=lambda: {"observedGeneration": -1})
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    config_maps: dict[str, dict[str, Any]] = field(default_factory=dict)
    created: list[str] = field(default_factory=list)
    patched: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    failed_among_others: set[tuple[str, str]] = field(default_factory=set)
    events: list[tuple[str, str]] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    calls: int = 0
    die_after: int | None = None
    _uids: int = 0
    _outlines: dict[int, Outline | InvalidSpec] = field(default_factory=dict)

    # What a user does

    def edit(self, **changes: Any) -> None:
        self.spec = self.spec | changes
        self.generation += 1

    def edit_template(self, **changes: Any) -> None:
        self.edit(template=self.spec["template"] | changes)

    def delete(self, name: str) -> None:
        """As `kubectl delete saejob`."""
        del self.jobs[name]

    # How training jobs fare

    def run(self, *names: str) -> None:
        for name in names:
            self._tell(name, "Running")

    def succeed(self, *names: str, **figures: float) -> None:
        """With 0.5 + k/100 as explained variance and k as L0, where `figures` say nothing else."""
        for name in names:
            saes = self.jobs[name]["spec"]["saes"]
            told = [
                {"name": sae["name"], "phase": "Succeeded"}
                | {"explainedVariance": 0.5 + sae["architecture"]["k"] / 100, "l0": float(sae["architecture"]["k"])}
                | figures
                for sae in saes
            ]
            self._tell(name, "Succeeded", told)

    def fail(self, *names: str, message: str = "the loss is not finite") -> None:
        for name in names:
            self._tell(name, "Failed", message=message)

    def tell_saes(self, name: str, phase: str, *phases: str) -> None:
        """A job whose SAEs stand differently."""
        saes = self.jobs[name]["spec"]["saes"]
        told = [
            {"name": sae["name"], "phase": each, "explainedVariance": 0.5, "l0": 8.0}
            | ({"message": "NaN"} if each == "Failed" else {})
            for sae, each in zip(saes, phases, strict=True)
        ]
        self._tell(name, phase, told)
        if phase == "Succeeded":
            failed = (sae["name"] for sae in told if sae["phase"] == "Failed")
            self.failed_among_others |= {(self.jobs[name]["metadata"]["uid"], sae) for sae in failed}

    def follow(self) -> bool:
        """Training jobs that were suspended, resumed or asked to go on say so; returns whether any did."""
        followed = False
        for name, job in self.jobs.items():
            phase, seen = job["status"].get("phase"), job["status"]["observedGeneration"]
            if seen == job["metadata"]["generation"]:
                continue
            followed = True
            if job["spec"]["suspend"]:
                self._tell(name, "Suspended")
            elif phase in ("Succeeded", "Failed", "Suspended"):
                self._tell(name, "Preflight")
            else:
                job["status"]["observedGeneration"] = job["metadata"]["generation"]
        return followed

    def end_report(self, *, failed: bool = False) -> None:
        report = next(job for job in self.reports.values() if not job["status"].get("conditions"))
        kind = {"type": "Failed", "reason": "BackoffLimitExceeded", "message": "it failed"} if failed else {}
        moment = (self.now - timedelta(minutes=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
        condition = {"type": "Complete", "status": "True", "lastTransitionTime": moment} | kind
        report["status"] = {"conditions": [condition]}

    def _tell(self, name: str, phase: str, saes: list[dict[str, Any]] | None = None, message: str = "") -> None:
        job = self.jobs[name]
        status = {
            "phase": phase,
            "observedGeneration": job["metadata"]["generation"],
            "conditions": [{"type": "Ready", "status": "False", "reason": phase, "message": message}],
        }
        job["status"] = status | ({"saes": saes} if saes is not None else {})

    # What is asked of it

    def counts(self, name: str) -> list[int]:
        """k of a job's SAEs."""
        return [sae["architecture"]["k"] for sae in self.jobs[name]["spec"]["saes"]]

    def by_k(self) -> dict[int, str]:
        """Name of the job of each k."""
        return {k: name for name in self.jobs for k in self.counts(name)}

    @property
    def trials(self) -> dict[str, int]:
        return self.status["trials"]

    @property
    def phase(self) -> str | None:
        return self.status.get("phase")

    def condition(self, kind: str) -> dict[str, Any] | None:
        found = self.status.get("conditions") or []
        return next((condition for condition in found if condition["type"] == kind), None)

    def message(self) -> str:
        ready = self.condition("Ready")
        assert ready is not None
        return ready["message"]

    def given(self) -> SweepStep:
        """What the last report was given."""
        return SweepStep.model_validate_json(self.config_maps[list(self.reports)[-1]]["data"]["step.json"])

    # The operator

    def settle(self, looks: int = 20) -> None:
        """Looks until nothing changes."""
        for _ in range(looks):
            before = self.calls
            followed = self.follow()
            self.look()
            if self.calls == before and not followed:
                return
        raise AssertionError(f"still something to do: {json.dumps(self.status, indent=1)}")

    def look(self) -> None:
        wanted = self.wanted()
        try:
            self._apply(wanted)
        except Died:
            self.die_after = None
        self.now += timedelta(seconds=1)

    def observed(self) -> ObservedSweep:
        spec = SAESweepSpec.model_validate(self.spec)
        status = SAESweepStatus.model_validate(self.status)
        metadata = projection.metadata({"metadata": self._metadata()})
        return ObservedSweep(
            metadata=metadata,
            spec=spec,
            status=status,
            outline=None if is_at_rest(metadata, status) else self._outline(spec),
            training_jobs=tuple(trial_job_facts(job) for job in self.jobs.values()),
            defaults=self.defaults,
            jobs=tuple(projection.job_facts(job) for job in self.reports.values()),
        )

    def wanted(self) -> Wanted:
        return reconcile_sweep(self.observed(), self.settings, self.now)

    def _outline(self, spec: SAESweepSpec) -> Outline | InvalidSpec:
        if self.generation not in self._outlines:
            try:
                self._outlines[self.generation] = outline(spec)
            except SweepInvalid as error:
                problems = (SpecProblem(problem.field, problem.message) for problem in error.problems)
                self._outlines[self.generation] = InvalidSpec(tuple(problems))
        return self._outlines[self.generation]

    def _metadata(self) -> dict[str, Any]:
        return {"name": NAME, "namespace": NAMESPACE, "uid": UID, "generation": self.generation}

    def _called(self) -> None:
        self.calls += 1
        if self.calls == self.die_after:
            raise Died

    def _apply(self, wanted: Wanted) -> None:
        for patch in wanted.patch_training_jobs:
            self._patch(patch)
        leaving = {name for name, _ in wanted.delete_training_jobs}
        for manifest in wanted.create:
            self._create(manifest, leaving)
        if wanted.status != self.status:
            self._check(wanted.status)
            self.status = json.loads(json.dumps(wanted.status))
            if not self.phases or self.phases[-1] != self.status["phase"]:
                self.phases.append(self.status["phase"])
            self._called()
        self.events += [(event.reason, event.message) for event in wanted.events]
        for kind, name in wanted.delete_objects:
            assert kind == "ConfigMap"
            self.config_maps.pop(name, None)
            self._called()
        for name in wanted.delete_jobs:
            del self.reports[name]
            self._called()
        for name, uid in wanted.delete_training_jobs:
            assert self.jobs[name]["metadata"]["uid"] == uid
            del self.jobs[name]
            self.deleted.append(name)
            self._called()
        self._check_jobs()

    def _patch(self, patch: TrainingJobPatch) -> None:
        job = self.jobs[patch.name]
        assert job["metadata"]["uid"] == patch.uid
        spec = merged(job["spec"], changes_of(job["spec"], patch.changes))
        job["metadata"]["annotations"] = merged(job["metadata"]["annotations"], patch.annotations)
        if spec != job["spec"]:
            job["spec"] = spec
            job["metadata"]["generation"] += 1
        self.patched.append(patch.name)
        self._called()

    def _create(self, manifest: Mapping[str, Any], leaving: set[str]) -> None:
        name = manifest["metadata"]["name"]
        assert len(name) <= 63
        assert is_controlled_by(manifest["metadata"], UID)
        raw = json.loads(json.dumps(manifest))
        self._uids += 1
        created = self.now.strftime("%Y-%m-%dT%H:%M:%SZ")
        raw["metadata"] |= {"uid": f"uid-{self._uids}", "generation": 1, "creationTimestamp": created}
        match manifest["kind"]:
            case "ConfigMap":
                self.config_maps[name] = raw
            case "Job":
                assert all(job["status"].get("conditions") for job in self.reports.values()), "two reports at once"
                unfinished = set(self.unfinished()) - leaving
                assert not unfinished, "a report before all has ended"
                self.reports.setdefault(name, raw | {"status": {}})
            case _:
                assert len(name) <= 40, name
                assert sweep_of(raw["metadata"]) == UID
                if name not in self.jobs:
                    # The API server's default.
                    self.jobs[name] = raw | {"status": {"observedGeneration": -1, "phase": None}}
                    self.created.append(name)
        self._called()

    # Rules that hold at every moment

    def _check(self, status: Mapping[str, Any]) -> None:
        size = len(json.dumps(status, ensure_ascii=False).encode())
        assert size <= STATUS_LIMIT, size
        invalid = any(item["type"] == "Invalid" for item in status["conditions"])
        ends = {"Succeeded": "Current", "Failed": "Failed"}
        expected = "Failed" if invalid else ends.get(status["phase"], "InProgress")
        assert kstatus(self.generation, status) == expected, status
        # A patch from what is stored to it is all that is ever written.
        merge_patch(self.status, status)

    def _check_jobs(self) -> None:
        names = [
            sae["name"]
            for job in self.jobs.values()
            for sae in job["spec"]["saes"]
            if (job["metadata"]["uid"], sae["name"]) not in self.failed_among_others
        ]
        assert len(set(names)) == len(names), "a trial is in two jobs"
        outputs = [job["spec"]["output"]["uri"] for job in self.jobs.values()]
        assert len(set(outputs)) == len(outputs), "two jobs write to one folder"

    def unfinished(self) -> list[str]:
        return [
            name
            for name, job in self.jobs.items()
            if job["status"]["phase"] not in ("Succeeded", "Failed")
            or job["status"]["observedGeneration"] != job["metadata"]["generation"]
        ]
