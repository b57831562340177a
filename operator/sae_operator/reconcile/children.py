"""Manifests of a step's ConfigMap and Job: valid under PodSecurity `restricted`, and without API credentials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sae_operator.api.base import ApiModel
from sae_operator.api.run_settings import EnvVar, Resources, RunSettings
from sae_operator.api.steps import (
    ENV_POD_IP,
    ENV_PODS,
    ENV_RENDEZVOUS,
    ENV_SECRETS_DIRECTORY,
    ENV_TERMINATION_MESSAGE,
    PROGRESS_PORT,
    RENDEZVOUS_PORT,
    SECRETS_DIRECTORY,
    STEP_SPEC_PATH,
    TERMINATION_MESSAGE_PATH,
    ExitCode,
)
from sae_operator.reconcile.names import (
    ANNOTATION_ATTEMPT,
    ANNOTATION_WORK,
    LABEL_QUEUE,
    LABEL_STEP,
    LABEL_UID,
    STEP_CONTAINER,
    child_name,
    first_pod_host,
    labels,
    owner_reference,
    service_name,
)
from sae_operator.reconcile.observed import Defaults, Metadata

# Steps that load no model; they take none of the GPU pods' resources and selectors.
CPU_STEPS = frozenset({"preflight", "prepare", "finalize", "report"})

USER = 65532
HOME = "/home/job"
# What a pod asks for when its settings and the plan say nothing: enough to start, little enough to fit anywhere.
CPU_REQUEST, MEMORY_REQUEST = "500m", "1Gi"
CPU_STEP_CPU_REQUEST = "250m"
MIB = 2**20
# Of JSON.
CONTAINERS = (dict, list)
# Processes on several GPUs of a pod exchange data through it; the 64 MiB that a container has by itself are too few.
SHARED_MEMORY = "2Gi"


@dataclass(frozen=True)
class StepWanted:
    """One attempt at one step.

    Attributes:
        kind, metadata: the resource that it belongs to.
        work: key of the round of work.
        spec: what the pods are given, resolved.
        run: the pods' settings.
        memory_bytes: memory that the plan says a pod needs; None when it is not known.
        completions, parallelism: of an Indexed Job whose pods work apart from each other; None for other Jobs.
        pods: how many pods work together: all of them, or none.
    """

    kind: str
    metadata: Metadata
    step: str
    attempt: int
    work: str
    spec: ApiModel
    run: RunSettings
    defaults: Defaults
    default_image: str
    memory_bytes: int | None = None
    completions: int | None = None
    parallelism: int | None = None
    pods: int = 1

    @property
    def name(self) -> str:
        return child_name(self.metadata, self.step, self.attempt)


def step_objects(wanted: StepWanted) -> tuple[dict[str, Any], ...]:
    """ConfigMap, Service (of pods that work together) and Job of the attempt, in the order in which they are to be
    created."""
    manifest = wanted.spec.to_manifest()
    service = [_service(wanted)] if wanted.pods > 1 else []
    return config_map(wanted), *service, _job(wanted, secret_names(manifest))


def secret_names(manifest: Any) -> list[str]:
    """Names in every `secretRef` of a step's specification, sorted."""
    found: set[str] = set()
    # Not by recursion, since most values are plain ones: that took a tenth of what a Job costs.
    waiting = [manifest]
    while waiting:
        inside = waiting.pop()
        if isinstance(inside, list):
            waiting.extend(value for value in inside if isinstance(value, CONTAINERS))
            continue
        for key, value in inside.items():
            if not isinstance(value, CONTAINERS):
                continue
            if key == "secretRef" and isinstance(value, dict) and "name" in value:
                found.add(str(value["name"]))
            else:
                waiting.append(value)
    return sorted(found)


def resources_of(run: RunSettings, step: str) -> Resources:
    return run.cpu_steps.resources if step in CPU_STEPS else run.resources


def resources_field(step: str, run_field: str) -> str:
    """Path of the resources that a step's pods take, e.g. `spec.run.cpuSteps.resources`."""
    return f"{run_field}.cpuSteps.resources" if step in CPU_STEPS else f"{run_field}.resources"


def _metadata(wanted: StepWanted) -> dict[str, Any]:
    return {
        "name": wanted.name,
        "namespace": wanted.metadata.namespace,
        "labels": labels(wanted.kind, wanted.metadata, wanted.step),
        "annotations": {ANNOTATION_ATTEMPT: str(wanted.attempt), ANNOTATION_WORK: wanted.work},
        "ownerReferences": [owner_reference(wanted.kind, wanted.metadata, controller=True)],
    }


def config_map(wanted: StepWanted) -> dict[str, Any]:
    """The ConfigMap that the attempt's pods mount."""
    # Ten times as fast as json.dumps with an indent, which is pure Python.
    text = wanted.spec.model_dump_json(by_alias=True, exclude_none=True, indent=1)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(wanted),
        "data": {PurePosixPath(STEP_SPEC_PATH).name: text},
    }


def _service(wanted: StepWanted) -> dict[str, Any]:
    """Gives each pod a name in DNS, from the first moment on; one for all attempts at the step."""
    metadata = _metadata(wanted)
    del metadata["annotations"]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**metadata, "name": service_name(wanted.metadata)},
        "spec": {
            "clusterIP": "None",
            # Pods look for each other before they are ready.
            "publishNotReadyAddresses": True,
            "selector": {LABEL_UID: wanted.metadata.uid, LABEL_STEP: wanted.step},
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
        },
    }


def _job(wanted: StepWanted, secrets: Sequence[str]) -> dict[str, Any]:
    template = {
        "metadata": {
            "labels": {**wanted.run.pod_labels, **labels(wanted.kind, wanted.metadata, wanted.step)},
            "annotations": dict(wanted.run.pod_annotations),
        },
        "spec": _pod_spec(wanted, secrets),
    }
    metadata = _metadata(wanted)
    queue = wanted.run.queue_name or wanted.defaults.queue_name
    if queue is not None:
        metadata["labels"][LABEL_QUEUE] = queue
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        # No activeDeadlineSeconds: the Job's own counts the time in which its pods wait for a node and between retries,
        # starts again with each step and attempt, and keeps nothing of what pods say as they end.
        "spec": {
            **_retries(wanted),
            # A pod is replaced when it has ended, not when it begins to: two never write at once.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": STEP_CONTAINER,
                            "operator": "In",
                            "values": [int(ExitCode.INVALID)],
                        },
                    },
                    *_stopped_together(wanted),
                ]
            },
            "template": template,
        },
    }


def _stopped_together(wanted: StepWanted) -> list[dict[str, Any]]:
    """A pod that is evicted takes the others along, after a checkpoint: no failure of theirs."""
    if wanted.pods == 1:
        return []
    on_exit_codes = {"containerName": STEP_CONTAINER, "operator": "In", "values": [int(ExitCode.STOPPED)]}
    return [{"action": "Ignore", "onExitCodes": on_exit_codes}]


def _retries(wanted: StepWanted) -> dict[str, Any]:
    if wanted.pods > 1:
        return {
            "completionMode": "Indexed",
            "completions": wanted.pods,
            "parallelism": wanted.pods,
            # They fail together: as many failures of all as a single pod may have.
            "backoffLimit": (wanted.run.backoff_limit + 1) * wanted.pods - 1,
        }
    if wanted.completions is None:
        return {"backoffLimit": wanted.run.backoff_limit}
    return {
        "completionMode": "Indexed",
        "completions": wanted.completions,
        "parallelism": min(wanted.parallelism or wanted.completions, wanted.completions),
        # Not backoffLimitPerIndex: for its sake the Job controller keeps an index's last pod until it has made another
        # one, which it cannot in a namespace that is being deleted, and that would never end. The operator counts by
        # index itself; whatever becomes of it, one index has had more than its share when all have failed more often.
        "backoffLimit": wanted.run.backoff_limit * wanted.completions,
    }


def _pod_spec(wanted: StepWanted, secrets: Sequence[str]) -> dict[str, Any]:
    run, shared, on_gpu = wanted.run, _shared_memory(wanted), wanted.step not in CPU_STEPS
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": run.termination_grace_period_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(wanted, secrets)],
        "volumes": [
            {"name": "spec", "configMap": {"name": wanted.name}},
            {"name": "home", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            *([{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shared}}] if shared else []),
            *(
                {"name": f"secret-{i}", "secret": {"secretName": name, "optional": False}}
                for i, name in enumerate(secrets)
            ),
            *_claims(run),
        ],
    }
    selector, tolerations = _placement(wanted)
    optional: dict[str, Any] = {
        "nodeSelector": selector,
        "tolerations": tolerations,
        "priorityClassName": run.priority_class_name,
        "serviceAccountName": run.service_account_name,
        "runtimeClassName": run.runtime_class_name if on_gpu else None,
        "affinity": run.affinity.to_manifest() if on_gpu and run.affinity is not None else None,
        "imagePullSecrets": [reference.to_manifest() for reference in run.image_pull_secrets],
        # With it, the names that the Job controller gives its pods are known to DNS.
        "subdomain": service_name(wanted.metadata) if wanted.pods > 1 else None,
    }
    return spec | {key: value for key, value in optional.items() if value}


def _shared_memory(wanted: StepWanted) -> str | None:
    """Size of a GPU pod's shared memory: as asked for, or where several processes train in it (one per GPU) a default;
    None where the container's own serves."""
    if wanted.step in CPU_STEPS:
        return None
    if wanted.run.shm_size is not None:
        return str(wanted.run.shm_size)
    limits = wanted.run.resources.limits
    gpus = [str(count) for name, count in limits.items() if name.endswith("/gpu")]
    return SHARED_MEMORY if wanted.step == "train" and any(count not in ("0", "1") for count in gpus) else None


def _claim_volumes(run: RunSettings) -> dict[str, str]:
    """Name of the volume of each claim: one, however many folders it is mounted at."""
    claims = dict.fromkeys(volume.claim_name for volume in run.volumes)
    return {claim: f"claim-{i}" for i, claim in enumerate(claims)}


def _claims(run: RunSettings) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "persistentVolumeClaim": {
                "claimName": claim,
                # Only then can a claim that many nodes may read serve pods on several of them.
                "readOnly": all(volume.read_only for volume in run.volumes if volume.claim_name == claim),
            },
        }
        for claim, name in _claim_volumes(run).items()
    ]


def _claim_mounts(run: RunSettings) -> list[dict[str, Any]]:
    names = _claim_volumes(run)
    return [
        {"name": names[volume.claim_name], "mountPath": volume.mount_path, "readOnly": volume.read_only}
        for volume in run.volumes
    ]


def _placement(wanted: StepWanted) -> tuple[dict[str, str], list[Any]]:
    """Node selector and tolerations; the namespace's defaults are for GPU nodes, so CPU steps do not take them."""
    if wanted.step in CPU_STEPS:
        settings = wanted.run.cpu_steps
        return dict(settings.node_selector), [toleration.to_manifest() for toleration in settings.tolerations]
    selector = wanted.run.node_selector or wanted.defaults.node_selector
    tolerations = [toleration.to_manifest() for toleration in wanted.run.tolerations]
    return dict(selector), tolerations or [dict(toleration) for toleration in wanted.defaults.tolerations]


def _container(wanted: StepWanted, secrets: Sequence[str]) -> dict[str, Any]:
    run = wanted.run
    return {
        "name": STEP_CONTAINER,
        "image": run.image or wanted.defaults.image or wanted.default_image,
        "imagePullPolicy": run.image_pull_policy,
        "command": ["sae-job"],
        "args": ["step", wanted.step, STEP_SPEC_PATH],
        "env": [*_own_env(wanted), *(_env(variable) for variable in run.env)],
        "ports": _ports(wanted),
        "resources": _resources(wanted),
        "terminationMessagePath": TERMINATION_MESSAGE_PATH,
        # The end of the log serves where a step could not write its message.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "spec", "mountPath": str(PurePosixPath(STEP_SPEC_PATH).parent), "readOnly": True},
            {"name": "home", "mountPath": HOME},
            {"name": "tmp", "mountPath": "/tmp"},
            *([{"name": "shm", "mountPath": "/dev/shm"}] if _shared_memory(wanted) else []),
            *(
                {"name": f"secret-{i}", "mountPath": f"{SECRETS_DIRECTORY}/{name}", "readOnly": True}
                for i, name in enumerate(secrets)
            ),
            *_claim_mounts(run),
        ],
    }


def _ports(wanted: StepWanted) -> list[dict[str, Any]]:
    ports = [{"name": "progress", "containerPort": PROGRESS_PORT}]
    if wanted.pods > 1:
        ports.append({"name": "rendezvous", "containerPort": RENDEZVOUS_PORT})
    return ports


def _own_env(wanted: StepWanted) -> list[dict[str, Any]]:
    fixed = {
        "HOME": HOME,
        "TMPDIR": "/tmp",
        "HF_HOME": f"{HOME}/.cache/huggingface",
        "XDG_CACHE_HOME": f"{HOME}/.cache",
        ENV_SECRETS_DIRECTORY: SECRETS_DIRECTORY,
        ENV_TERMINATION_MESSAGE: TERMINATION_MESSAGE_PATH,
    }
    if wanted.pods > 1:
        fixed[ENV_PODS] = str(wanted.pods)
        fixed[ENV_RENDEZVOUS] = f"{first_pod_host(wanted.metadata, wanted.name)}:{RENDEZVOUS_PORT}"
    pod_ip = {"name": ENV_POD_IP, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    return [*({"name": name, "value": value} for name, value in fixed.items()), pod_ip]


def _env(variable: EnvVar) -> dict[str, Any]:
    if variable.secret_key_ref is not None:
        return {"name": variable.name, "valueFrom": {"secretKeyRef": variable.secret_key_ref.to_manifest()}}
    return {"name": variable.name, "value": variable.value or ""}


def _resources(wanted: StepWanted) -> dict[str, Any]:
    """Limits and requests as strings; CPU and memory requests are filled in where nothing is said of them."""
    given = resources_of(wanted.run, wanted.step)
    limits = {name: str(quantity) for name, quantity in given.limits.items()}
    requests = {name: str(quantity) for name, quantity in given.requests.items()}
    on_cpu = wanted.step in CPU_STEPS
    memory = MEMORY_REQUEST
    if wanted.memory_bytes and not on_cpu:
        memory = f"{-(-wanted.memory_bytes // MIB)}Mi"
    for name, quantity in (("cpu", CPU_STEP_CPU_REQUEST if on_cpu else CPU_REQUEST), ("memory", memory)):
        # The API server takes a limit for the request where there is none.
        if name not in limits:
            requests.setdefault(name, quantity)
    return {key: value for key, value in (("limits", limits), ("requests", requests)) if value}
