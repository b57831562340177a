"""The resources as whole objects, and the table of their kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.base import API_VERSION, ApiModel
from sae_operator.api.status import ActivationCacheStatus, CommonStatus, SAESweepStatus, SAETrainingJobStatus
from sae_operator.api.sweep import SAESweepSpec
from sae_operator.api.training_job import SAETrainingJobSpec


@dataclass(frozen=True)
class Kind:
    kind: str
    plural: str
    singular: str
    short_names: tuple[str, ...]
    spec: type[ApiModel]
    status: type[CommonStatus]


ACTIVATION_CACHE = Kind(
    "ActivationCache",
    "activationcaches",
    "activationcache",
    ("actcache", "actcaches"),
    ActivationCacheSpec,
    ActivationCacheStatus,
)
SAE_TRAINING_JOB = Kind(
    "SAETrainingJob",
    "saetrainingjobs",
    "saetrainingjob",
    ("saejob", "saejobs"),
    SAETrainingJobSpec,
    SAETrainingJobStatus,
)
SAE_SWEEP = Kind("SAESweep", "saesweeps", "saesweep", ("sweep", "sweeps"), SAESweepSpec, SAESweepStatus)
# Adding a kind is one row here.
KINDS: dict[str, Kind] = {kind.kind: kind for kind in (ACTIVATION_CACHE, SAE_TRAINING_JOB, SAE_SWEEP)}


@dataclass(frozen=True)
class Resource:
    """A validated resource."""

    kind: Kind
    name: str
    namespace: str
    spec: Any
    api_version: str = API_VERSION
