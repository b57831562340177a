"""Defaults of the namespace, resolved into what a step is given, never into the resource."""

from __future__ import annotations

from typing import TypeVar

from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.store import SecretRef, StoreLocation
from sae_operator.api.training_job import Activations, SAETrainingJobSpec
from sae_operator.reconcile.observed import Defaults

# Both have endpoint_url, region and secret_ref beside a uri.
Located = TypeVar("Located", StoreLocation, Activations)


def resolve_location(location: Located, defaults: Defaults) -> Located:
    """The location with the namespace's endpoint, region and Secret where an `s3://` location names none."""
    if location.uri is None or not location.uri.startswith("s3://"):
        return location
    secret = SecretRef(name=defaults.secret_name) if defaults.secret_name else None
    return location.model_copy(
        update={
            "endpoint_url": location.endpoint_url or defaults.endpoint_url,
            "region": location.region or defaults.region,
            "secret_ref": location.secret_ref or secret,
        }
    )


def resolve_cache(spec: ActivationCacheSpec, defaults: Defaults) -> ActivationCacheSpec:
    """The spec with its storage resolved. Identity is unchanged: it depends on neither endpoint nor credentials."""
    return spec.model_copy(update={"storage": resolve_location(spec.storage, defaults)})


def resolve_training_job(spec: SAETrainingJobSpec, defaults: Defaults) -> SAETrainingJobSpec:
    """The spec with its activations and its output resolved."""
    activations = resolve_location(spec.activations, defaults)
    if activations.cache is not None:
        activations = activations.model_copy(update={"cache": resolve_cache(activations.cache, defaults)})
    return spec.model_copy(update={"activations": activations, "output": resolve_location(spec.output, defaults)})
