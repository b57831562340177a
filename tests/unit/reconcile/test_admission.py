"""What the operator's administrator does not allow is refused before anything is created."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.sweep import SAESweepSpec
from sae_operator.api.sweep_expansion import expand, pack
from sae_operator.api.training_job import SAETrainingJobSpec
from sae_operator.reconcile.admission import KNOWN_ENV, again_after, check_cache, check_sweep, check_training_job
from sae_operator.reconcile.observed import Defaults, OperatorSettings
from tests.unit.reconcile import fake_cluster
from tests.unit.reconcile.fake_cluster import CACHE, JOB, FakeCluster, PodScript
from tests.unit.reconcile.specs import cache_spec, job_spec

STRICT = OperatorSettings(
    job_image="sae-job:test", allowed_images=("ghcr.io/team/*", "*@sha256:*"), allowed_service_accounts=("sae-*",)
)


def remote_code(**changes: Any) -> dict[str, Any]:
    return cache_spec(model={"name": "tiny", "trustRemoteCode": True}, **changes)


def live(**changes: Any) -> dict[str, Any]:
    source = {
        key: value for key, value in remote_code(**changes).items() if key not in ("storage", "parallelism", "tokens")
    }
    return {"live": {**source, "tokens": 500}}


TRAINING_CASES = {
    "image": (job_spec(run={"image": "docker.io/evil:1"}), "spec.run.image", "docker.io/evil:1"),
    "image of the inline cache": (
        job_spec({"cache": cache_spec(run={"image": "evil"})}),
        "spec.activations.cache.run.image",
        "evil",
    ),
    "service account": (
        job_spec(run={"serviceAccountName": "admin"}),
        "spec.run.serviceAccountName",
        "admin",
    ),
    "environment variable": (
        job_spec(run={"env": [{"name": "HF_HOME", "value": "/tmp"}, {"name": "ELSEWHERE", "value": "x"}]}),
        "spec.run.env[1].name",
        "HF_*, WANDB_*",
    ),
    "remote code of the inline cache": (
        job_spec({"cache": remote_code()}),
        "spec.activations.cache.model.trustRemoteCode",
        "--allow-trust-remote-code",
    ),
}


@pytest.mark.parametrize("case", TRAINING_CASES)
def test_a_training_job_that_asks_for_too_much_creates_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, field, word = TRAINING_CASES[case]
    monkeypatch.setattr(fake_cluster, "SETTINGS", STRICT)
    cluster = FakeCluster()
    cluster.create(JOB, "sae", spec)
    cluster.run()
    assert not cluster.jobs
    assert not cluster.config_maps
    assert list(cluster.resources) == [(JOB, "sae")]
    for kind in ("Invalid", "Stalled"):
        condition = cluster.condition(JOB, "sae", kind)
        assert condition is not None
        assert (condition["status"], condition["reason"]) == ("True", "NotAllowed")
        assert condition["message"].startswith(f"{field}: ")
        assert word in condition["message"]
    assert [event[1] for event in cluster.events] == ["NotAllowed"]
    # Corrected, it runs.
    cluster.edit(JOB, "sae", activations={"cache": cache_spec()}, run={"serviceAccountName": "sae-train"})
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"
    assert cluster.condition(JOB, "sae", "Invalid") is None


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (cache_spec(run={"image": "evil"}), "spec.run.image"),
        (cache_spec(run={"serviceAccountName": "admin"}), "spec.run.serviceAccountName"),
        (remote_code(), "spec.model.trustRemoteCode"),
    ],
)
def test_a_cache_that_asks_for_too_much_creates_nothing(
    spec: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_cluster, "SETTINGS", STRICT)
    cluster = FakeCluster()
    cluster.create(CACHE, "texts", spec)
    cluster.run()
    assert not cluster.jobs
    condition = cluster.condition(CACHE, "texts", "Stalled")
    assert condition is not None
    assert condition["message"].startswith(f"{field}: ")


def test_what_is_allowed_is_allowed() -> None:
    for image in ("ghcr.io/team/job:1", "ghcr.io/team/deep/job:1", "docker.io/any@sha256:00", None):
        spec = ActivationCacheSpec.model_validate(
            cache_spec(run={"image": image, "serviceAccountName": "sae-a"} if image else {})
        )
        assert check_cache(spec, Defaults(), STRICT) is None
    open_minded = replace(STRICT, allowed_images=(), allowed_service_accounts=(), allow_trust_remote_code=True)
    anything = remote_code(run={"image": "any", "serviceAccountName": "any"})
    assert check_cache(ActivationCacheSpec.model_validate(anything), Defaults(), open_minded) is None


def test_environment_variables_of_known_libraries_need_no_leave_and_a_list_replaces_them() -> None:
    def refused(*names: str, settings: OperatorSettings) -> list[str]:
        env = [{"name": name, "value": "x"} for name in names]
        found = check_cache(ActivationCacheSpec.model_validate(cache_spec(run={"env": env})), Defaults(), settings)
        return [] if found is None else [problem.field for problem in found.problems]

    known = ("HF_TOKEN", "WANDB_MODE", "AWS_REGION", "NCCL_DEBUG", "HTTPS_PROXY", "OMP_NUM_THREADS", "TZ", "LC_ALL")
    assert refused(*known, settings=STRICT) == []
    others = ("HUGGING_FACE_HUB_TOKEN", "TORCHDYNAMO_DISABLE", "CUBLASLT_WORKSPACE_SIZE", "OFI_NCCL_PROTOCOL")
    assert refused(*others, settings=STRICT) == []
    assert refused("TEAM_FLAG", settings=STRICT) == ["spec.run.env[0].name"]
    assert refused("NVIDIA_VISIBLE_DEVICES", settings=STRICT) == ["spec.run.env[0].name"]
    assert refused("MY_HF_TOKEN", "hf_token", settings=STRICT) == ["spec.run.env[0].name", "spec.run.env[1].name"]
    own = replace(STRICT, allowed_env=("TEAM_*",))
    assert refused("TEAM_FLAG", "HF_TOKEN", settings=own) == ["spec.run.env[1].name"]
    assert refused("TEAM_FLAG", "HF_TOKEN", settings=replace(STRICT, allowed_env=("*",))) == []


def test_known_variables_are_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "security.md").read_text()
    assert [name for name in KNOWN_ENV if f"`{name.upper()}`" not in text] == []


def test_the_operators_own_job_image_needs_no_leave_where_it_is_named() -> None:
    for run, defaults in (({"image": STRICT.job_image}, Defaults()), ({}, Defaults(image=STRICT.job_image))):
        spec = ActivationCacheSpec.model_validate(cache_spec(run=run))
        assert check_cache(spec, defaults, STRICT) is None


def test_a_refused_resource_is_suspended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The administrator narrows the list, and the user suspends what runs until that is settled."""

    def slow(step: str, index: int, earlier: int) -> PodScript:
        return PodScript(seconds=20 if step == "train" else 2)

    cluster = FakeCluster(slow)
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}, run={"image": "once:1"}))
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
    monkeypatch.setattr(fake_cluster, "SETTINGS", STRICT)
    cluster.edit(JOB, "sae", suspend=True)
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Suspended")
    assert not [job for job in cluster.jobs if "train" in job]
    cluster.wait(3)
    condition = cluster.condition(JOB, "sae", "Invalid")
    assert condition is not None
    assert cluster.phase(JOB, "sae") == "Suspended"
    cluster.edit(JOB, "sae", suspend=False, run={})
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"
    assert not cluster.status(JOB, "sae").get("attempts")


def test_the_default_service_account_needs_no_leave() -> None:
    spec = ActivationCacheSpec.model_validate(cache_spec(run={"serviceAccountName": "default"}))
    assert check_cache(spec, Defaults(), STRICT) is None


def test_patterns_tell_capital_letters_apart() -> None:
    spec = ActivationCacheSpec.model_validate(cache_spec(run={"image": "GHCR.IO/team/job:1"}))
    assert check_cache(spec, Defaults(), STRICT) is not None


def test_an_image_of_the_namespaces_defaults_is_refused_with_its_place_and_looked_at_again() -> None:
    refusal = check_training_job(SAETrainingJobSpec.model_validate(job_spec()), None, Defaults(image="evil"), STRICT)
    assert refusal is not None
    # Job and inline cache share the default: it is told once.
    assert [problem.field for problem in refusal.problems] == ["ConfigMap sae-operator-defaults: image"]
    assert again_after(refusal) == 60
    named = SAETrainingJobSpec.model_validate(job_spec(run={"image": "evil"}))
    told = check_training_job(named, None, Defaults(), STRICT)
    assert told is not None
    assert again_after(told) is None


def test_a_job_does_not_run_the_code_of_the_cache_that_it_refers_to() -> None:
    spec = SAETrainingJobSpec.model_validate(job_spec({"cacheRef": {"name": "texts"}}))
    refusal = check_training_job(spec, ActivationCacheSpec.model_validate(remote_code()), Defaults(), STRICT)
    assert refusal is not None
    assert refusal.problems[0].field == "ActivationCache texts: spec.model.trustRemoteCode"


def test_code_of_a_live_source_is_refused() -> None:
    refusal = check_training_job(SAETrainingJobSpec.model_validate(job_spec(live())), None, Defaults(), STRICT)
    assert refusal is not None
    assert refusal.problems[0].field == "spec.activations.live.model.trustRemoteCode"


def test_pods_that_were_let_in_go_on_and_nothing_follows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The administrator narrows the list while the first step works."""

    def slow(step: str, index: int, earlier: int) -> PodScript:
        return PodScript(seconds=20)

    cluster = FakeCluster(slow)
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}, run={"image": "once:1"}))
    cluster.run(5)
    assert cluster.phase(JOB, "sae") == "Preflight"
    monkeypatch.setattr(fake_cluster, "SETTINGS", STRICT)
    cluster.run(5)
    assert cluster.phase(JOB, "sae") == "Preflight"
    assert cluster.condition(JOB, "sae", "Invalid") is None
    cluster.run()
    assert len(cluster.jobs) == 1
    condition = cluster.condition(JOB, "sae", "Invalid")
    assert condition is not None
    assert condition["reason"] == "NotAllowed"


def test_a_training_that_was_let_in_is_told_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(step: str, index: int, earlier: int) -> PodScript:
        return PodScript(seconds=20 if step == "train" else 2)

    cluster = FakeCluster(slow)
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}, run={"image": "once:1"}))
    cluster.run(15)
    assert cluster.phase(JOB, "sae") == "Running"
    monkeypatch.setattr(fake_cluster, "SETTINGS", STRICT)
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"


def test_a_sweep_is_checked_in_its_template_and_in_what_its_parameters_set() -> None:
    template = job_spec({"uri": "s3://saes/some/cache"})
    template["saes"] = template["saes"][:1]
    space = {"parameters": [{"path": "run.image", "values": ["ghcr.io/team/a:1", "evil:1", "evil:2"]}]}
    sweep = SAESweepSpec.model_validate({"template": template, "space": space})
    jobs = [job.spec for job in pack(sweep, expand(sweep))]
    refusal = check_sweep(sweep, jobs, Defaults(), STRICT)
    assert refusal is not None
    assert [problem.field for problem in refusal.problems] == ["spec.template.run.image"] * 2
    assert "evil:1" in refusal.message
    assert "spec.space.parameters" in refusal.message
    named = SAESweepSpec.model_validate({"template": {**template, "run": {"image": "evil:3"}}, "space": space})
    told = check_sweep(named, [], Defaults(), STRICT)
    assert told is not None
    assert told.problems[0].field == "spec.template.run.image"
