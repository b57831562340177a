"""Pod and Job settings: a whitelist, so that every pod stays valid under PodSecurity `restricted`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from sae_operator.api.base import (
    MAX_COUNT,
    OBJECT_NAME_PATTERN,
    ApiModel,
    Count,
    CountOrZero,
    ObjectName,
    Rule,
    ShortText,
    one_of_set,
)

ENV_NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
LABEL_VALUE_PATTERN = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
LabelKey = Annotated[str, StringConstraints(max_length=253)]
# A name that is the value of a label, too.
QueueName = Annotated[str, StringConstraints(min_length=1, max_length=63, pattern=OBJECT_NAME_PATTERN)]
LabelValue = Annotated[str, StringConstraints(max_length=63, pattern=LABEL_VALUE_PATTERN)]
AnnotationValue = Annotated[str, StringConstraints(max_length=2048)]
SecretKey = Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=r"^[-._A-Za-z0-9]+$")]
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+|[numkMGTPE]|[KMGTPE]i)?$"
QUANTITY_LENGTH = 32


def _quantity(value: Any) -> Any:
    """One error for both forms of a quantity."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT:
        return value
    if isinstance(value, str) and len(value) <= QUANTITY_LENGTH and re.fullmatch(QUANTITY_PATTERN, value):
        return value
    message = 'must be a quantity: a whole number, or text such as "500m", "0.5" or "8Gi"'
    raise PydanticCustomError("quantity", "{message}", {"message": message})


# Kubernetes' resource.Quantity; an integer such as `nvidia.com/gpu: 1` is one too.
Quantity = Annotated[
    int | str,
    BeforeValidator(_quantity),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "minimum": 0,
            "maximum": MAX_COUNT,
            "maxLength": QUANTITY_LENGTH,
            "pattern": QUANTITY_PATTERN,
        }
    ),
]
ResourceList = Annotated[dict[LabelKey, Quantity], Field(max_length=16)]
StringMap = Annotated[dict[LabelKey, LabelValue], Field(max_length=32)]
Annotations = Annotated[dict[LabelKey, AnnotationValue], Field(max_length=32)]


class Resources(ApiModel):
    limits: ResourceList = Field(default_factory=dict)
    """Upper bounds, GPUs included, e.g. `nvidia.com/gpu: 1`."""
    requests: ResourceList = Field(default_factory=dict)
    """What the scheduler reserves; the limits when empty."""


class Toleration(ApiModel):
    # As Kubernetes has them: a pod that breaks one is refused when it is created, long after the manifest.
    RULES = (
        Rule(
            "self.operator != 'Exists' || !has(self.value)",
            lambda t: t.operator != "Exists" or t.value is None,
            "value is only for operator Equal",
            "value",
        ),
        Rule(
            "has(self.key) || self.operator == 'Exists'",
            lambda t: t.key is not None or t.operator == "Exists",
            "key may be left out only with operator Exists",
            "key",
        ),
        Rule(
            "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            lambda t: t.toleration_seconds is None or t.effect == "NoExecute",
            "tolerationSeconds is only for effect NoExecute",
            "tolerationSeconds",
        ),
    )

    key: LabelKey | None = None
    """Taint key that is tolerated; every taint when empty."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How key and value relate to the taint."""
    value: LabelValue | None = None
    """Taint value; only with `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; all when empty."""
    toleration_seconds: CountOrZero | None = None
    """How long a `NoExecute` taint is tolerated; for ever when empty."""


class SecretKeyRef(ApiModel):
    name: ObjectName
    """Name of the Secret."""
    key: SecretKey
    """Key in the Secret."""


# A folder of a claim holds code, too: with PATH it would stand in for the command, with others for a compiler or in a
# cache of compiled code, with the rest in libraries, as which NCCL and CUDA load plugins. Programs are named by AWS'
# files (`credential_process`), to PyTorch for a stack trace, and to CUDA for a core dump (`| program`). The files of
# NCCL and UCX set variables.
CODE_LOADERS = (
    "^(PATH|HOME|ENV|BASH_ENV|GCONV_PATH|CC|CXX|CUDA_(HOME|PATH|CACHE_PATH|COREDUMP_FILE)"
    "|TORCH_(EXTENSIONS_DIR|ADDR2LINE_BINARY|FORCE_NO_WEIGHTS_ONLY_LOAD)|PYTORCH_KERNEL_CACHE_PATH"
    "|TORCHINDUCTOR_(.*_DIR|CPP_MARCH|REDIS_.*)|AWS_(CONFIG|SHARED_CREDENTIALS)_FILE|NCCL_CONF_FILE|OMP_TOOL_LIBRARIES"
    "|UCX_(CONFIG|MODULE)_DIR|FI_PROVIDER_PATH|(IBV|RDMAV)_DRIVERS)$"
    "|^(LD_|PYTHON|OPENSSL_|TRITON_|GIT_)|_PLUGIN$|_INJECTION"
)


class EnvVar(ApiModel):
    RULES = (
        Rule(
            "has(self.value) != has(self.secretKeyRef)",
            one_of_set("value", "secret_key_ref"),
            "exactly one of value and secretKeyRef must be set",
        ),
        Rule(
            "!self.name.startsWith('SAE_JOB_')",
            lambda variable: not variable.name.startswith("SAE_JOB_"),
            "names that begin with SAE_JOB_ are set by the operator",
            "name",
        ),
        # An allow-list of images means nothing when a variable can make them load other code.
        Rule(
            f"!self.name.matches('{CODE_LOADERS}')",
            lambda variable: re.search(CODE_LOADERS, variable.name) is None,
            "a variable of this name could load code that the image does not hold; build an image instead",
            "name",
        ),
    )

    name: Annotated[str, StringConstraints(max_length=128, pattern=ENV_NAME_PATTERN)]
    """Name of the environment variable, e.g. `HF_TOKEN`; one of known libraries, unless the operator's administrator
    allows others."""
    value: Annotated[str, StringConstraints(max_length=1024)] | None = None
    """Its value, in the clear."""
    secret_key_ref: SecretKeyRef | None = None
    """Its value, from a Secret of the namespace."""


class ObjectReference(ApiModel):
    name: ObjectName
    """Name of the object in the same namespace."""


class NodeRequirement(ApiModel):
    RULES = (
        Rule(
            "self.operator in ['Exists', 'DoesNotExist'] == (self.values.size() == 0)",
            lambda r: (r.operator in ("Exists", "DoesNotExist")) == (not r.values),
            "values belong to operators In, NotIn, Gt and Lt, and to no other",
            "values",
        ),
        Rule(
            "!(self.operator in ['Gt', 'Lt']) || self.values.size() < 2",
            lambda r: r.operator not in ("Gt", "Lt") or len(r.values) < 2,
            "operators Gt and Lt compare with one value",
            "values",
        ),
    )

    key: LabelKey
    """Label of the node."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    """How the label relates to `values`."""
    values: Annotated[list[LabelValue], Field(max_length=16)] = Field(default_factory=list)
    """Values of the label."""


class NodeTerm(ApiModel):
    match_expressions: Annotated[list[NodeRequirement], Field(min_length=1, max_length=8)]
    """Requirements that must all be met."""


class NodeSelector(ApiModel):
    node_selector_terms: Annotated[list[NodeTerm], Field(min_length=1, max_length=4)]
    """Terms of which one must be met."""


class PreferredNodes(ApiModel):
    weight: Annotated[Count, Field(le=100)]
    """How much these nodes are preferred."""
    preference: NodeTerm
    """Which nodes."""


class NodeAffinity(ApiModel):
    required_during_scheduling_ignored_during_execution: NodeSelector | None = None
    """Nodes that may run the pods."""
    preferred_during_scheduling_ignored_during_execution: Annotated[list[PreferredNodes], Field(max_length=4)] = Field(
        default_factory=list
    )
    """Nodes that are preferred."""


class Affinity(ApiModel):
    """Node affinity as Kubernetes has it; pods are spread by their queue."""

    node_affinity: NodeAffinity | None = None
    """Which nodes."""


MOUNT_PATH_PATTERN = r"^(/[A-Za-z0-9_][A-Za-z0-9._-]*)+$"
# What the image holds, and what the operator mounts itself.
TAKEN_FOLDERS = r"^/(bin|boot|dev|etc|home|lib|lib64|opt|proc|root|run|sbin|sys|tmp|usr|var)(/|$)"


class ClaimedVolume(ApiModel):
    """A PersistentVolumeClaim of the namespace, e.g. with a model's files or a cache of the Hugging Face Hub."""

    RULES = (
        Rule(
            f"!self.mountPath.matches('{TAKEN_FOLDERS}')",
            lambda volume: re.search(TAKEN_FOLDERS, volume.mount_path) is None,
            "mountPath must lie outside the image's own folders, e.g. /data or /mnt/models",
            "mountPath",
        ),
    )

    claim_name: ObjectName
    """Name of the PersistentVolumeClaim."""
    mount_path: Annotated[str, StringConstraints(max_length=255, pattern=MOUNT_PATH_PATTERN)]
    """Where the pods see it, e.g. `/data`."""
    read_only: bool = False
    """Mount it for reading alone."""


# A year: nothing runs for longer, and sums of times stay small numbers.
MAX_SECONDS = 366 * 24 * 3600
Seconds = Annotated[Count, Field(le=MAX_SECONDS)]


class CpuStepSettings(ApiModel):
    """Overrides for the steps without a GPU (preflight, prepare, finalize); they take none of the GPU's selectors."""

    resources: Resources = Field(default_factory=Resources)
    """CPU and memory of these steps."""
    node_selector: StringMap = Field(default_factory=dict)
    """Labels of nodes that may run them."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = Field(default_factory=list)
    """Taints that they tolerate."""


class RunSettings(ApiModel):
    RULES = (
        Rule(
            "!has(self.volumes) || self.volumes.all(v, self.volumes.exists_one(w, w.mountPath == v.mountPath))",
            lambda run: len({volume.mount_path for volume in run.volumes}) == len(run.volumes),
            "mountPath of volumes must be unique",
            "volumes",
        ),
    )

    image: ShortText | None = None
    """Container image of the pods; the operator's default job image when empty."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the image is pulled."""
    image_pull_secrets: Annotated[list[ObjectReference], Field(max_length=8)] = Field(default_factory=list)
    """Secrets for a private registry."""
    resources: Resources = Field(default_factory=Resources)
    """Resources of the GPU pods (cache and train steps)."""
    node_selector: StringMap = Field(default_factory=dict)
    """Labels of nodes that may run the GPU pods."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = Field(default_factory=list)
    """Taints that the GPU pods tolerate."""
    affinity: Affinity | None = None
    """Nodes that the GPU pods need or prefer, beyond `nodeSelector`."""
    queue_name: QueueName | None = None
    """LocalQueue of Kueue that admits the Jobs; the namespace's default when empty."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of all pods."""
    runtime_class_name: ObjectName | None = None
    """RuntimeClass of the GPU pods, e.g. `nvidia`."""
    shm_size: Quantity | None = None
    """Shared memory (`/dev/shm`) of the GPU pods, for several processes in one; 2Gi with several GPUs when empty."""
    volumes: Annotated[list[ClaimedVolume], Field(max_length=8)] = Field(default_factory=list)
    """PersistentVolumeClaims that all pods mount."""
    service_account_name: ObjectName | None = None
    """ServiceAccount of all pods, e.g. for workload identity; its token is never mounted."""
    env: Annotated[list[EnvVar], Field(max_length=32)] = Field(default_factory=list)
    """Further environment variables of all pods."""
    pod_labels: StringMap = Field(default_factory=dict)
    """Further labels of all pods."""
    pod_annotations: Annotations = Field(default_factory=dict)
    """Annotations of all pods."""
    backoff_limit: Annotated[CountOrZero, Field(le=100)] = 3
    """How often a failed pod is retried; pods that a node disruption ended do not count."""
    active_deadline_seconds: Seconds | None = None
    """Fail when the pods of one round of work have run for longer than this, all steps and retries together; time in a
    queue or waiting for a node does not count. Unlimited when empty."""
    startup_deadline_seconds: Seconds = 3600
    """Fail when a pod that has a node has not started within this time, e.g. since its image cannot be pulled. Waiting
    in a queue or for a node does not count."""
    ttl_seconds_after_finished: Annotated[CountOrZero, Field(le=MAX_SECONDS)] | None = None
    """Delete the Jobs, pods and ConfigMaps of a finished resource after this time; the resource itself stays. Kept when
    empty."""
    termination_grace_period_seconds: Annotated[Count, Field(le=3600)] = 120
    """Time for the last checkpoint after SIGTERM; checkpoints can be large."""
    cpu_steps: CpuStepSettings = Field(default_factory=CpuStepSettings)
    """Overrides for preflight, prepare and finalize."""
