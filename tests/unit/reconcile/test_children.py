"""Jobs and ConfigMaps: what pods are given, and that PodSecurity `restricted` takes them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sae_operator.api.steps import CacheStep, TrainStep
from sae_operator.reconcile.names import step_of
from sae_operator.reconcile.observed import Defaults, Metadata
from tests.unit.reconcile.fake_cluster import CACHE, JOB, FakeCluster
from tests.unit.reconcile.specs import cache_spec, job_spec


def job_of(cluster: FakeCluster, step: str) -> dict[str, Any]:
    return next(job for name, job in cluster.jobs.items() if f"-{step}-" in name)


def pod_of(cluster: FakeCluster, step: str) -> dict[str, Any]:
    return job_of(cluster, step)["spec"]["template"]["spec"]


def container_of(cluster: FakeCluster, step: str) -> dict[str, Any]:
    (container,) = pod_of(cluster, step)["containers"]
    return container


def lived(spec: dict[str, Any], kind: str = CACHE, **cluster: Any) -> FakeCluster:
    made = FakeCluster(**cluster)
    made.create(kind, "acts", spec)
    made.run()
    assert made.phase(kind, "acts") in ("Ready", "Succeeded")
    return made


@pytest.mark.parametrize("step", ["prepare", "cache", "finalize"])
def test_pods_are_valid_under_pod_security_restricted(step: str) -> None:
    volumes = [{"claimName": "hub", "mountPath": "/data"}]
    cluster = lived(cache_spec(run={"volumes": volumes, "shmSize": "1Gi", "runtimeClassName": "nvidia"}))
    pod, container = pod_of(cluster, step), container_of(cluster, step)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 65532
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    kinds = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
    assert all(set(volume) - {"name"} <= kinds for volume in pod["volumes"])
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["restartPolicy"] == "Never"


def test_a_pod_is_given_its_step_its_secrets_and_where_to_answer() -> None:
    cluster = lived(cache_spec())
    container = container_of(cluster, "cache")
    assert (container["command"], container["args"]) == (["sae-job"], ["step", "cache", "/etc/sae-job/step.json"])
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts) == {"/etc/sae-job", "/home/job", "/tmp", "/run/sae-job/secrets/s3"}
    volumes = {volume["name"]: volume for volume in pod_of(cluster, "cache")["volumes"]}
    assert volumes[mounts["/run/sae-job/secrets/s3"]]["secret"] == {"secretName": "s3", "optional": False}
    assert volumes[mounts["/etc/sae-job"]]["configMap"] == {"name": job_of(cluster, "cache")["metadata"]["name"]}
    env = {variable["name"]: variable for variable in container["env"]}
    assert env["HOME"]["value"] == "/home/job"
    assert env["SAE_JOB_SECRETS_DIRECTORY"]["value"] == "/run/sae-job/secrets"
    assert env["SAE_JOB_TERMINATION_MESSAGE"]["value"] == container["terminationMessagePath"]
    assert env["SAE_JOB_POD_IP"]["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert container["ports"] == [{"name": "progress", "containerPort": 8080}]


def test_jobs_ignore_disruptions_and_fail_at_once_on_exit_code_2() -> None:
    cluster = lived(cache_spec(run={"backoffLimit": 5}))
    single, indexed = job_of(cluster, "prepare")["spec"], job_of(cluster, "cache")["spec"]
    for spec in (single, indexed):
        assert spec["podReplacementPolicy"] == "Failed"
        assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == ["Ignore", "FailJob"]
        assert spec["podFailurePolicy"]["rules"][1]["onExitCodes"] == {
            "containerName": "step",
            "operator": "In",
            "values": [2],
        }
        assert "suspend" not in spec
    assert single["backoffLimit"] == 5
    assert indexed["completionMode"] == "Indexed"
    assert (indexed["completions"], indexed["parallelism"], indexed["backoffLimit"]) == (2, 2, 10)
    # The Job controller would keep a namespace that is being deleted for ever.
    assert "backoffLimitPerIndex" not in indexed


def test_no_more_pods_are_asked_for_than_there_are_shards() -> None:
    cluster = lived(cache_spec(parallelism=64))
    assert job_of(cluster, "cache")["spec"]["completions"] == 5
    given = cluster.step_spec(job_of(cluster, "cache")["metadata"]["name"])
    assert isinstance(given, CacheStep)
    assert given.completions == 5


def test_cpu_steps_take_none_of_the_gpu_pods_settings() -> None:
    gpu = {
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "8Gi"}},
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "cpuSteps": {"resources": {"limits": {"cpu": 2}}, "nodeSelector": {"pool": "cpu"}},
    }
    cluster = lived(cache_spec(run=gpu))
    for step in ("prepare", "finalize"):
        assert pod_of(cluster, step)["nodeSelector"] == {"pool": "cpu"}
        assert "tolerations" not in pod_of(cluster, step)
        assert container_of(cluster, step)["resources"] == {"limits": {"cpu": "2"}, "requests": {"memory": "1Gi"}}
    assert pod_of(cluster, "cache")["nodeSelector"] == {"gpu": "h100"}
    assert container_of(cluster, "cache")["resources"] == {
        "limits": {"nvidia.com/gpu": "1", "memory": "8Gi"},
        "requests": {"cpu": "500m"},
    }


def test_gpu_pods_alone_have_a_runtime_class_affinity_and_the_shared_memory_asked_for() -> None:
    term = {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h100", "h200"]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}
    cluster = lived(cache_spec(run={"runtimeClassName": "nvidia", "affinity": affinity, "shmSize": "8Gi"}))
    pod = pod_of(cluster, "cache")
    assert pod["runtimeClassName"] == "nvidia"
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert required == {"nodeSelectorTerms": [term]}
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in pod["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in container_of(cluster, "cache")["volumeMounts"]
    for step in ("prepare", "finalize"):
        pod = pod_of(cluster, step)
        assert not pod.keys() & {"runtimeClassName", "affinity"}
        assert "shm" not in {volume["name"] for volume in pod["volumes"]}


def test_all_pods_mount_the_claims_each_once_however_many_folders_it_has() -> None:
    volumes = [
        {"claimName": "models", "mountPath": "/data/models", "readOnly": True},
        {"claimName": "scratch", "mountPath": "/scratch"},
        {"claimName": "models", "mountPath": "/mnt/models", "readOnly": True},
    ]
    cluster = lived(cache_spec(run={"volumes": volumes}))
    for step in ("prepare", "cache", "finalize"):
        claims = [volume for volume in pod_of(cluster, step)["volumes"] if "persistentVolumeClaim" in volume]
        assert claims == [
            {"name": "claim-0", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
            {"name": "claim-1", "persistentVolumeClaim": {"claimName": "scratch", "readOnly": False}},
        ]
        mounts = [mount for mount in container_of(cluster, step)["volumeMounts"] if "claim" in mount["name"]]
        assert mounts == [
            {"name": "claim-0", "mountPath": "/data/models", "readOnly": True},
            {"name": "claim-1", "mountPath": "/scratch", "readOnly": False},
            {"name": "claim-0", "mountPath": "/mnt/models", "readOnly": True},
        ]


def test_a_claim_is_mounted_for_writing_where_one_of_its_folders_needs_it() -> None:
    volumes = [
        {"claimName": "data", "mountPath": "/data/in", "readOnly": True},
        {"claimName": "data", "mountPath": "/data/out"},
    ]
    cluster = lived(cache_spec(run={"volumes": volumes}))
    (claim,) = [volume for volume in pod_of(cluster, "cache")["volumes"] if "persistentVolumeClaim" in volume]
    assert claim["persistentVolumeClaim"]["readOnly"] is False


def test_jobs_carry_the_label_of_their_queue_and_nothing_else_does() -> None:
    cluster = lived(job_spec({"cache": cache_spec(run={"queueName": "slow"})}, run={"queueName": "fast"}), JOB)
    for step, queue in {"preflight": "fast", "train": "fast", "prepare": "slow", "cache": "slow"}.items():
        job = job_of(cluster, step)
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue
        # Kueue takes pods with the label for its own, and suspends the Job itself.
        assert "kueue.x-k8s.io/queue-name" not in job["spec"]["template"]["metadata"]["labels"]
        assert "suspend" not in job["spec"]
        config_map = cluster.config_maps[job["metadata"]["name"]]
        assert "kueue.x-k8s.io/queue-name" not in config_map["metadata"]["labels"]


def test_the_queue_of_the_namespace_serves_where_none_is_named() -> None:
    spec = job_spec({"cache": cache_spec(run={"queueName": "slow"})})
    cluster = lived(spec, JOB, defaults=Defaults(queue_name="shared"))
    assert job_of(cluster, "train")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "shared"
    assert job_of(cluster, "cache")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "slow"
    assert "kueue.x-k8s.io/queue-name" not in job_of(lived(cache_spec()), "cache")["metadata"]["labels"]


def test_no_job_has_a_deadline_of_its_own() -> None:
    run = {"activeDeadlineSeconds": 100, "startupDeadlineSeconds": 100, "ttlSecondsAfterFinished": 1000}
    cluster = lived(cache_spec(run=run))
    for job in cluster.jobs.values():
        assert not job["spec"].keys() & {"activeDeadlineSeconds", "ttlSecondsAfterFinished"}
        assert "activeDeadlineSeconds" not in job["spec"]["template"]["spec"]


def test_memory_is_requested_as_the_plan_says() -> None:
    cluster = lived(cache_spec())
    assert container_of(cluster, "cache")["resources"] == {"requests": {"cpu": "500m", "memory": "1024Mi"}}
    assert container_of(cluster, "prepare")["resources"] == {"requests": {"cpu": "250m", "memory": "1Gi"}}


def test_children_are_labelled_and_controlled_by_their_resource() -> None:
    labels = {"team": "interp", "sae-operator.dev/kind": "Impostor"}
    cluster = lived(cache_spec(run={"podLabels": labels, "podAnnotations": {"note": "x"}}))
    job = job_of(cluster, "cache")
    uid = cluster.resources[CACHE, "acts"]["metadata"]["uid"]
    ours = {
        "app.kubernetes.io/managed-by": "sae-operator",
        "sae-operator.dev/kind": "ActivationCache",
        "sae-operator.dev/name": "acts",
        "sae-operator.dev/uid": uid,
        "sae-operator.dev/step": "cache",
    }
    assert job["metadata"]["labels"] == ours
    assert job["spec"]["template"]["metadata"]["labels"] == {"team": "interp"} | ours
    assert job["spec"]["template"]["metadata"]["annotations"] == {"note": "x"}
    config_map = cluster.config_maps[job["metadata"]["name"]]
    for child in (job, config_map):
        (reference,) = child["metadata"]["ownerReferences"]
        assert (reference["uid"], reference["controller"]) == (uid, True)


def test_env_may_come_from_a_secret() -> None:
    env = [
        {"name": "HF_TOKEN", "secretKeyRef": {"name": "hub", "key": "token"}},
        {"name": "HF_HUB_OFFLINE", "value": "1"},
    ]
    cluster = lived(cache_spec(run={"env": env}))
    found = {variable["name"]: variable for variable in container_of(cluster, "prepare")["env"]}
    assert found["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert found["HF_HUB_OFFLINE"]["value"] == "1"


def test_defaults_of_the_namespace_reach_the_pods_and_never_the_resource() -> None:
    defaults = Defaults(
        endpoint_url="http://s3.local:9000",
        region="eu-1",
        secret_name="store",
        image="registry.local/sae-job:1",
        node_selector={"gpu": "a100"},
        tolerations=({"key": "gpu", "operator": "Exists"},),
    )
    spec = job_spec({"cache": cache_spec(storage={"uri": "s3://saes/caches"})}, output={"uri": "s3://saes/out"})
    cluster = lived(spec, JOB, defaults=defaults)
    train = cluster.step_spec(job_of(cluster, "train")["metadata"]["name"])
    assert isinstance(train, TrainStep)
    assert train.cache is not None
    for location in (train.spec.output, train.activations, train.cache.storage):
        assert location.secret_ref is not None
        assert (location.endpoint_url, location.region, location.secret_ref.name) == (
            "http://s3.local:9000",
            "eu-1",
            "store",
        )
    assert container_of(cluster, "train")["image"] == "registry.local/sae-job:1"
    assert pod_of(cluster, "train")["nodeSelector"] == {"gpu": "a100"}
    assert "nodeSelector" not in pod_of(cluster, "preflight")
    # Both the cache's pods and the training's look in the same place.
    cache = cluster.step_spec(job_of(cluster, "finalize")["metadata"]["name"])
    assert isinstance(cache, CacheStep)
    assert cache.location == train.activations
    for raw in cluster.resources.values():
        assert "s3.local" not in json.dumps(raw["spec"])


def test_a_places_own_settings_win_over_the_defaults_and_files_take_none() -> None:
    defaults = Defaults(endpoint_url="http://s3.local:9000", secret_name="store")
    spec = job_spec({"uri": "file:///data/cache"}, output={"uri": "s3://saes/out", "endpointUrl": "https://other"})
    cluster = lived(spec, JOB, defaults=defaults)
    train = cluster.step_spec(job_of(cluster, "train")["metadata"]["name"])
    assert isinstance(train, TrainStep)
    assert train.spec.output.endpoint_url == "https://other"
    assert train.activations.to_manifest() == {"uri": "file:///data/cache"}


def test_names_hold_step_and_attempt_and_stay_short() -> None:
    metadata = Metadata(name="n" * 40, namespace="lab", uid="01234567-89ab-cdef-0123-456789abcdef", generation=1)
    assert step_of(f"{'n' * 40}-01234567-preflight-12", metadata) == "preflight"
    assert step_of(f"{'n' * 40}-01234567-preflight", metadata) is None
    assert step_of("other-01234567-train-1", metadata) is None
    assert len(f"{'n' * 40}-01234567-preflight-999") <= 63
