"""Health checks and actions for Argo CD, run by a real Lua as Argo CD runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sae_operator.api.base import API_VERSION, GROUP
from sae_operator.api.manifest import read_yaml, validate_spec
from sae_operator.api.resources import KINDS, SAE_TRAINING_JOB
from sae_operator.api.status import SAETrainingJobStatus
from sae_operator.reconcile.observed import InvalidSpec, Metadata, ObservedTrainingJob, SpecProblem
from sae_operator.reconcile.training_job import reconcile_training_job
from tests.unit.gitops.argo_cd import (
    CUSTOMIZATIONS,
    FOLDER,
    act,
    action_scripts,
    discover,
    discovery_script,
    health,
    health_script,
    kinds,
    run,
)
from tests.unit.gitops.argo_cd_testdata import CASES, Case
from tests.unit.gitops.kstatus import kstatus
from tests.unit.gitops.lives import LIVES, Version, lead, name_of
from tests.unit.gitops.sweep_lives import SWEEP_LIVES, lead_sweep
from tests.unit.reconcile.fake_cluster import SETTINGS
from tools.argo_cd_config import config_map

# What Argo CD should make of what kstatus says.
BY_KSTATUS = {"Current": {"Healthy"}, "Failed": {"Degraded"}, "InProgress": {"Progressing", "Suspended"}}


def document(path: Path) -> dict[str, Any]:
    (found,) = read_yaml(path.read_text())
    return found


def health_tests() -> Iterator[Any]:
    for kind in kinds():
        for case in document(CUSTOMIZATIONS / kind / "health_test.yaml")["tests"]:
            yield pytest.param(kind, case, id=f"{kind}-{Path(case['inputPath']).stem}")


def action_tests(field: str) -> Iterator[Any]:
    for kind in kinds():
        for case in document(CUSTOMIZATIONS / kind / "actions" / "action_test.yaml")[field]:
            name = f"{kind}-{case.get('action', 'discovery')}-{Path(case['inputPath']).stem}"
            yield pytest.param(kind, case, id=name)


def test_every_kind_has_them() -> None:
    assert kinds() == sorted(KINDS)
    for kind in kinds():
        assert set(action_scripts(kind)) == {"suspend", "resume", "retry"}


def test_the_rule_for_health_is_one_for_all_kinds() -> None:
    assert len({health_script(kind) for kind in kinds()}) == 1


@pytest.mark.parametrize(("kind", "case"), list(health_tests()))
def test_health_is_as_its_test_data_says(kind: str, case: dict[str, Any]) -> None:
    resource = document(CUSTOMIZATIONS / kind / case["inputPath"])
    assert health(health_script(kind), resource) == case["healthStatus"]


@pytest.mark.parametrize(("kind", "case"), list(action_tests("discoveryTests")))
def test_actions_are_offered_as_their_test_data_says(kind: str, case: dict[str, Any]) -> None:
    resource = document(CUSTOMIZATIONS / kind / "actions" / case["inputPath"])
    offered = discover(discovery_script(kind), resource)
    assert offered == sorted(case["result"], key=lambda action: action["name"])


@pytest.mark.parametrize(("kind", "case"), list(action_tests("actionTests")))
def test_an_action_changes_what_its_test_data_says_and_nothing_else(kind: str, case: dict[str, Any]) -> None:
    folder = CUSTOMIZATIONS / kind / "actions"
    resource, expected = document(folder / case["inputPath"]), document(folder / case["expectedOutputPath"])
    assert act(action_scripts(kind)[case["action"]], resource) == expected
    assert expected != resource


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_test_data_are_resources_of_ours(kind: str) -> None:
    files = sorted((CUSTOMIZATIONS / kind).rglob("testdata/*.yaml"))
    assert files
    for path in files:
        resource = document(path)
        assert (resource["apiVersion"], resource["kind"]) == (API_VERSION, kind), path
        validate_spec(kind, resource["spec"])
        assert set(resource["status"]) <= _field_names(kind), path


def _field_names(kind: str) -> set[str]:
    fields = KINDS[kind].status.model_fields
    return {field.alias or name for name, field in fields.items()}


def cases() -> Iterator[Any]:
    for kind, found in CASES.items():
        for case in found:
            yield pytest.param(kind, case, id=f"{kind}-{case.name}")


@pytest.mark.parametrize(("kind", "case"), list(cases()))
def test_what_the_reconciler_writes_today_has_the_health_of_the_test_data(kind: str, case: Case) -> None:
    resource = case.make()
    told = health(health_script(kind), resource)
    assert (told["status"], told["message"]) == (case.health, case.message(resource))
    enabled = {action["name"] for action in discover(discovery_script(kind), resource) if "disabled" not in action}
    assert enabled == case.actions


def lives() -> Iterator[Any]:
    for life in LIVES:
        yield pytest.param(lambda life=life: lead(life).versions, id=name_of(life))
    for story in SWEEP_LIVES:
        yield pytest.param(lambda story=story: lead_sweep(story).versions, id=f"sweep{story.__name__}")


@pytest.mark.parametrize("life", list(lives()))
def test_health_agrees_with_kstatus_throughout_a_life(life: Callable[[], list[Version]]) -> None:
    versions = life()
    assert versions
    for version in versions:
        told = health(health_script(version.kind), version.resource)["status"]
        assert told in BY_KSTATUS[kstatus(version.resource)], (told, version.resource)
        assert (told == "Suspended") == (version.phase == "Suspended" and version.written_by == "operator"), version


@pytest.mark.parametrize("life", list(lives()))
def test_an_action_that_is_offered_leads_to_a_valid_spec(life: Callable[[], list[Version]]) -> None:
    for version in life():
        spec = version.resource["spec"]
        for action in discover(discovery_script(version.kind), version.resource):
            changed = act(action_scripts(version.kind)[action["name"]], version.resource)
            validate_spec(version.kind, changed["spec"])
            if "disabled" not in action:
                assert changed["spec"] != {"suspend": False, "retry": 0, **spec}, action


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_resource_that_nobody_has_looked_at_yet(kind: str) -> None:
    new = {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": "new", "generation": 1}, "spec": {}}
    for resource in (new, {**new, "status": {}}, {**new, "status": {"observedGeneration": -1}}):
        assert health(health_script(kind), resource)["status"] == "Progressing"
        offered = discover(discovery_script(kind), resource)
        assert [action["name"] for action in offered if "disabled" not in action] == ["suspend"]


def test_a_spec_that_is_refused_is_degraded_with_the_fields_path() -> None:
    problem = SpecProblem("spec.run.image", "the operator's settings do not allow docker.io/other/job")
    metadata = Metadata(name="sae", namespace="lab", uid="01234567-89ab-cdef-0123-456789abcdef", generation=1)
    observed = ObservedTrainingJob(metadata=metadata, spec=InvalidSpec((problem,)), status=SAETrainingJobStatus())
    status = reconcile_training_job(observed, SETTINGS, datetime(2026, 1, 1, tzinfo=UTC)).status
    resource = {"metadata": {"name": "sae", "generation": 1}, "spec": {}, "status": status}
    assert kstatus(resource) == "Failed"
    assert health(health_script(SAE_TRAINING_JOB.kind), resource) == {
        "status": "Degraded",
        "message": f"Pending: {problem.field}: {problem.message}",
    }


def test_scripts_have_the_libraries_that_argo_cd_gives_them_and_no_others() -> None:
    names = "return type(string), type(io), type(math), type(debug), type(coroutine), type(os.execute), type(os.time)"
    assert run(f"local function all() {names} end return {{all()}}", {}) == [*["nil"] * 6, "function"]
    assert run('return tostring(pcall(function() return ("x"):upper() end))', {}) == "false"


class TestConfigMap:
    @pytest.fixture
    def data(self) -> dict[str, str]:
        return document(FOLDER / "argocd-cm.yaml")["data"]

    def test_it_is_what_its_program_writes(self) -> None:
        assert (FOLDER / "argocd-cm.yaml").read_text() == config_map(), "run python tools/argo_cd_config.py"

    def test_its_scripts_are_the_files(self, data: dict[str, str]) -> None:
        assert len(data) == 2 * len(kinds())
        for kind in kinds():
            assert data[f"resource.customizations.health.{GROUP}_{kind}"] == health_script(kind)
            (actions,) = read_yaml(data[f"resource.customizations.actions.{GROUP}_{kind}"])
            assert actions["discovery.lua"] == discovery_script(kind)
            assert {it["name"]: it["action.lua"] for it in actions["definitions"]} == action_scripts(kind)
            assert set(actions) == {"discovery.lua", "definitions"}

    def test_every_action_that_is_offered_is_defined(self) -> None:
        for kind in kinds():
            offered = discover(discovery_script(kind), {"metadata": {}, "spec": {}})
            assert {action["name"] for action in offered} == set(action_scripts(kind))
