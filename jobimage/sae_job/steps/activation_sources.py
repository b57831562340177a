"""What a training job trains on: a finished cache, or a model that runs beside the training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sae_job.activations.first_statistics import statistics_of_first_rows
from sae_job.activations.live import LiveActivations, LiveSource
from sae_job.activations.manifest import CacheManifest, read_manifest
from sae_job.activations.reader import CachedActivations, HeldOut, held_out_contexts_for
from sae_job.activations.usage import note_use
from sae_job.errors import InvalidInput
from sae_job.models.full import FullModel
from sae_job.models.hooked import HookedModel
from sae_job.models.mirror import LocalModel, localized
from sae_job.saes.config import Provenance
from sae_job.steps.context import StepContext
from sae_job.steps.provenance import provenance_of
from sae_job.storage.base import ObjectStore
from sae_job.text.plan import CacheIndex
from sae_job.training.place import ALONE, Place
from sae_job.training.plan import TrainingPlan
from sae_job.training.scaling import ActivationStatistics
from sae_operator.api.activation_cache import ActivationCacheSpec, ModelSource, Sampling
from sae_operator.api.steps import TrainStep
from sae_operator.api.store import StoreAccess, StoreLocation

logger = logging.getLogger(__name__)

# Order in which rows are read: one for every job, so that SAEs of different jobs see the same batches.
ORDER_SEED = 0


@dataclass(frozen=True)
class OpenActivations:
    """Batches to train on, and rows that are never in one."""

    stream: CachedActivations | LiveActivations
    held_out: HeldOut


class ActivationSource(Protocol):
    """Where a job's activations come from."""

    @property
    def store(self) -> ObjectStore:
        """Folder of the cache, or of a live source's contexts."""
        ...

    @property
    def rows(self) -> int:
        """Rows that the job asked for, held-out ones included: the first ones, where there are more."""
        ...

    @property
    def widths(self) -> dict[str, int]:
        """Key of every hook -> width of its activations."""
        ...

    @property
    def sampling(self) -> Sampling:
        """How contexts became rows."""
        ...

    def whole_model(self) -> FullModel:
        """The language model that the activations are of.

        Raises:
            InvalidInput: nobody knows which it is, or it is not there any more.
        """
        ...

    def statistics(self, hooks: Sequence[str]) -> Mapping[str, ActivationStatistics]:
        """Statistics of these hooks' activations; they depend on nothing but the rows that the job asked for."""
        ...

    def open(self, plan: TrainingPlan, place: Place = ALONE) -> OpenActivations:
        """Begin to read, or to compute, the rows of one of the processes that train together.

        Raises:
            InvalidInput: too few rows, or what is stored is damaged.
        """
        ...

    def close(self) -> None:
        """Free what reading and computing took; the held-out rows stay."""
        ...

    def provenance(self, hook: str) -> Provenance:
        """What SAEs on a hook tell of their activations."""
        ...

    def facts(self) -> dict[str, Any]:
        """What results.json tells of the activations."""
        ...


def open_source(step: TrainStep, context: StepContext, *, device: torch.device) -> ActivationSource:
    """The source of a job's activations.

    Args:
        step: the job.
        context: opens its stores.
        device: where SAEs are trained, and a live source's model runs.

    Raises:
        InvalidInput: the cache is not finished, or the live source's contexts are not prepared.
    """
    store = context.open_store(step.activations)
    if step.spec.activations.live is None:
        manifest = read_manifest(store)
        # Of a cache: nothing is written to a folder that is none.
        note_use(store, context.now())
        return CacheSource(store, manifest, context, location=step.activations, asked=step.cache, device=device)
    index = CacheIndex.load(store)
    if index is None or step.cache is None:
        raise InvalidInput("NotPrepared", f"{store.uri} holds no contexts: run the preflight step first")
    return LiveModelSource(store, index, step.cache, context, device=device)


class CacheSource:
    """A finished cache.

    Args:
        store: its folder.
        manifest: what it says of itself.
        context: opens the model's store.
        location: the same, and who opens it.
        asked: the cache that the job asked for, where it is described; others may have extended it since.
        device: where SAEs are trained.
    """

    def __init__(
        self,
        store: ObjectStore,
        manifest: CacheManifest,
        context: StepContext,
        *,
        location: StoreLocation,
        asked: ActivationCacheSpec | None,
        device: torch.device,
    ) -> None:
        self.store = store
        self.rows = manifest.tokens if asked is None else min(asked.tokens, manifest.tokens)
        # A cache is of at least the hooks that were asked for; an SAE without a hook means the only one of these.
        hooks = [hook.name for hook in manifest.hooks] if asked is None else [hook.key for hook in asked.hooks]
        self.widths = {hook: manifest.hook(hook).d_in for hook in hooks}
        self.sampling = Sampling.model_validate(manifest.spec.get("sampling", {}))
        # The manifest tells no credentials.
        self._model = model_of(manifest, location) if asked is None else asked.model
        self._manifest = manifest
        self._context = context
        self._device = device
        self._stream: CachedActivations | None = None

    def whole_model(self) -> FullModel:
        if self._model is None:
            raise InvalidInput(
                "ModelUnknown",
                f"{self.store.uri} does not tell which model it is of; leave ce_loss_score out",
                field="spec.evaluation.metrics",
            )
        return _localized(self._model, self.store, self._manifest.model["revision"], self._context).load_full(
            device=self._device
        )

    def statistics(self, hooks: Sequence[str]) -> Mapping[str, ActivationStatistics]:
        return statistics_of_first_rows(self.store, self._manifest, self.rows, hooks=hooks)

    def open(self, plan: TrainingPlan, place: Place = ALONE) -> OpenActivations:
        stream = CachedActivations.open(
            self.store,
            hooks=plan.hooks,
            batch_size=plan.batch_size // place.size,
            seed=ORDER_SEED,
            held_out_contexts=held_out_contexts_for(self.store, self._manifest, plan.held_out_rows),
            total_rows=self.rows,
            device=self._device,
            rank=place.index,
            world_size=place.size,
        )
        self._stream = stream
        return OpenActivations(stream, stream.held_out(plan.held_out_rows))

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def provenance(self, hook: str) -> Provenance:
        manifest = self._manifest
        return provenance_of(
            hook,
            model_name=manifest.model["name"],
            model=self._model,
            dataset_path=manifest.dataset["path"],
            context_size=manifest.context_size,
            sampling=self.sampling,
            tokenizer=manifest.tokenizer,
        )

    def facts(self) -> dict[str, Any]:
        manifest = self._manifest
        return {
            "cache": {
                "uri": self.store.uri,
                "identity": manifest.identity,
                "manifest_sha256": manifest.sha256,
                "tokens": manifest.tokens,
                "rows": self.rows,
                "hooks": [hook.name for hook in manifest.hooks],
                "dtype": manifest.dtype,
                "model": manifest.model,
                "dataset": manifest.dataset,
            }
        }


class LiveModelSource:
    """A model that runs beside the training, on contexts that preflight stored.

    Args:
        store: folder of the contexts.
        index: their plan.
        spec: what the live source would be as a cache.
        context: opens the model's store.
        device: where the model runs.
    """

    def __init__(
        self,
        store: ObjectStore,
        index: CacheIndex,
        spec: ActivationCacheSpec,
        context: StepContext,
        *,
        device: torch.device,
    ) -> None:
        self.store = store
        self.rows = min(spec.tokens, index.tokens)
        self.widths = {hook.key: index.model.d_in[hook.key] for hook in spec.hooks}
        self.sampling = spec.sampling
        self._index = index
        self._spec = spec
        self._context = context
        self._device = device
        self._running: tuple[HookedModel, LiveSource] | None = None
        self._stream: LiveActivations | None = None

    def whole_model(self) -> FullModel:
        return self._local_model().load_full(device=self._device)

    def statistics(self, hooks: Sequence[str]) -> Mapping[str, ActivationStatistics]:
        return {statistics.name: statistics for statistics in self._live().statistics() if statistics.name in hooks}

    def open(self, plan: TrainingPlan, place: Place = ALONE) -> OpenActivations:
        source = self._live()
        stream = LiveActivations.open(
            source,
            hooks=plan.hooks,
            batch_size=plan.batch_size // place.size,
            seed=ORDER_SEED,
            held_out_contexts=source.held_out_contexts(plan.held_out_rows),
            total_rows=self.rows,
            device=self._device,
            rank=place.index,
            world_size=place.size,
        )
        self._stream = stream
        return OpenActivations(stream, stream.held_out(plan.held_out_rows))

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._running is not None:
            # Others may still refer to the model; what it takes is its weights.
            self._running[0].module.to("meta")
            self._running = None

    def provenance(self, hook: str) -> Provenance:
        return provenance_of(
            hook,
            model_name=self._index.model.name,
            model=self._spec.model,
            dataset_path=self._index.dataset.path,
            context_size=self._index.context_size,
            sampling=self.sampling,
            tokenizer=self._index.tokenizer.model_dump(mode="json", by_alias=True),
        )

    def facts(self) -> dict[str, Any]:
        index = self._index.model_dump(mode="json", by_alias=True)
        return {
            "live": {
                "uri": self.store.uri,
                "tokens": self._index.tokens,
                "rows": self.rows,
                "hooks": list(self.widths),
                "dtype": self._spec.storage.dtype,
                "model": index["model"],
                "dataset": index["dataset"],
            }
        }

    def _live(self) -> LiveSource:
        """The running model, which is loaded when it is first needed."""
        if self._running is None:
            model = self._local_model().load_hooked(list(self.widths), device=self._device)
            self._running = model, LiveSource(self.store, self._spec, model)
        return self._running[1]

    def _local_model(self) -> LocalModel:
        return _localized(self._spec.model, self.store, self._index.model.revision, self._context)


def model_of(manifest: CacheManifest, location: StoreLocation) -> ModelSource | None:
    """How the model of a cache was loaded; None when the manifest does not tell.

    A model in an object store is opened as the cache is: manifests tell no credentials. Nor do they allow code of the
    model's repository to be run: whoever can write to the bucket could say so. A resource says it, which the operator
    checks.

    Args:
        location: of the cache.
    """
    told = manifest.spec.get("model")
    if told is None:
        return None
    model = ModelSource.model_validate(told).model_copy(update={"trust_remote_code": False})
    if not model.name.startswith("s3://"):
        return model
    endpoint = None if model.store is None else model.store.endpoint_url
    access = StoreAccess(
        endpoint_url=endpoint or location.endpoint_url, region=location.region, secret_ref=location.secret_ref
    )
    return model.model_copy(update={"store": access})


def _localized(source: ModelSource, store: ObjectStore, revision: str | None, context: StepContext) -> LocalModel:
    return localized(
        source, open_store=context.open_store, mirror=store, revision=revision, should_stop=context.should_stop
    )
