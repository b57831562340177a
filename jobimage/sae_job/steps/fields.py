"""Where what is wrong with a job's activations stands in its spec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sae_job.errors import InvalidInput
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.training_job import Activations, SAETrainingJobSpec

# What a live source calls a cache's fields; it runs in the pods of its job.
_FIELDS_OF_LIVE = {"storage.dtype": "dtype", "storage.shardBytes": "bufferBytes"}
_FIELDS_OF_CACHE = frozenset(field.alias for field in ActivationCacheSpec.model_fields.values())


@contextmanager
def fields_of_activations(spec: SAETrainingJobSpec) -> Iterator[None]:
    """Errors about the spec of a cache, or of what a live source would be as one, told with the path in the job's."""
    try:
        yield
    except InvalidInput as error:
        below = error.field.removeprefix("spec.")
        if below.partition(".")[0].partition("[")[0] not in _FIELDS_OF_CACHE:
            raise
        field, prefix = _told(spec.activations, below)
        raise InvalidInput(error.reason, prefix + error.message, field=field) from error


def _told(activations: Activations, below: str) -> tuple[str, str]:
    """The field of the job for `spec.<below>` of the cache, and what to say before the message."""
    if activations.live is not None:
        own = below.partition(".")[0] == "run"
        return f"spec.{below}" if own else f"spec.activations.live.{_FIELDS_OF_LIVE.get(below, below)}", ""
    if activations.cache is not None:
        return f"spec.activations.cache.{below}", ""
    if activations.cache_ref is not None:
        return "spec.activations.cacheRef", f"spec.{below} of ActivationCache {activations.cache_ref.name!r}: "
    return "spec.activations.uri", f"spec.{below} of the cache: "
