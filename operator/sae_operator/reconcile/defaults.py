"""Defaults of the namespace, resolved into what a step is given, never into the resource."""

from __future__ import annotations

from typing import TypeVar

from sae_operator.api.activation_cache import ActivationCacheSpec, DatasetSource, ModelSource
from sae_operator.api.store import SecretRef, StoreAccess, StoreLocation
from sae_operator.api.training_job import Activations, LiveActivations, SAETrainingJobSpec
from sae_operator.reconcile.observed import Defaults

# All have endpoint_url, region and secret_ref.
Access = TypeVar("Access", StoreLocation, Activations, StoreAccess)
Located = TypeVar("Located", StoreLocation, Activations)
Computed = TypeVar("Computed", ActivationCacheSpec, LiveActivations)


def resolve_location(location: Located, defaults: Defaults) -> Located:
    """The location with the namespace's endpoint, region and Secret where an `s3://` location names none."""
    if location.uri is None or not location.uri.startswith("s3://"):
        return location
    return _filled(location, defaults)


def resolve_cache(spec: ActivationCacheSpec, defaults: Defaults) -> ActivationCacheSpec:
    """The spec with its storage, its model and its text resolved. Where the cache lies follows from the spec as it is
    written: the endpoint of a model or a text counts in an identity."""
    return _with_sources(spec, defaults).model_copy(update={"storage": resolve_location(spec.storage, defaults)})


def resolve_training_job(spec: SAETrainingJobSpec, defaults: Defaults) -> SAETrainingJobSpec:
    """The spec with its activations and its output resolved."""
    activations = resolve_location(spec.activations, defaults)
    if activations.cache is not None:
        activations = activations.model_copy(update={"cache": resolve_cache(activations.cache, defaults)})
    if activations.live is not None:
        activations = activations.model_copy(update={"live": _with_sources(activations.live, defaults)})
    return spec.model_copy(update={"activations": activations, "output": resolve_location(spec.output, defaults)})


def _filled(access: Access, defaults: Defaults) -> Access:
    secret = SecretRef(name=defaults.secret_name) if defaults.secret_name else None
    return access.model_copy(
        update={
            "endpoint_url": access.endpoint_url or defaults.endpoint_url,
            "region": access.region or defaults.region,
            "secret_ref": access.secret_ref or secret,
        }
    )


def _with_sources(spec: Computed, defaults: Defaults) -> Computed:
    """With access to a model and a text that lie in an object store."""

    def access(source: ModelSource | DatasetSource, address: str) -> dict[str, StoreAccess]:
        return {"store": _filled(source.store or StoreAccess(), defaults)} if address.startswith("s3://") else {}

    model, dataset = spec.model, spec.dataset
    return spec.model_copy(
        update={
            "model": model.model_copy(update=access(model, model.name)),
            "dataset": dataset.model_copy(update=access(dataset, dataset.path)),
        }
    )
