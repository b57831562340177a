"""The cache step: one worker's share of the shards, from the contexts that prepare stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from sae_job.activations.contexts import ContextReader
from sae_job.activations.format import STORAGE_DTYPES
from sae_job.activations.harvest import ActivationModel, HostCopy, harvest
from sae_job.activations.sink_filter import SinkFilter, usable_positions
from sae_job.activations.writer import OpenShard, ShardWriter, is_stored
from sae_job.errors import InvalidInput, Stopped
from sae_job.models.load import default_device
from sae_job.models.mirror import localized
from sae_job.steps.context import StepContext
from sae_job.storage.base import ObjectStore
from sae_job.text.plan import CacheIndex
from sae_operator.api.steps import CacheStep, ExitCode, StepResult, TrainStep

SOFTWARE = ("sae-operator", "torch", "transformers")


def run_cache(step: CacheStep | TrainStep, context: StepContext) -> StepResult:
    """Write the shards i with i % completions == completion_index that are not stored yet.

    Raises:
        InvalidInput: the contexts are damaged, too few rows pass the norm filter, or activations are not finite.
        Stopped: asked to stop; shards that were finished are stored.
    """
    if not isinstance(step, CacheStep):
        raise TypeError(f"the cache step is given a {type(step).__name__}")

    def load_model(index: CacheIndex) -> ActivationModel:
        model = localized(
            step.spec.model,
            open_store=context.open_store,
            mirror=context.open_store(step.location),
            revision=index.model.revision,
            should_stop=context.should_stop,
        )
        return model.load_hooked([hook.key for hook in step.spec.hooks])

    device = torch.cuda.get_device_name() if default_device().type == "cuda" else "cpu"
    return write_shards(step, context, load_model, device=device)


def write_shards(
    step: CacheStep, context: StepContext, load_model: Callable[[CacheIndex], ActivationModel], *, device: str
) -> StepResult:
    """As `run_cache`, with a model of the caller's; it is not loaded when there is nothing to write."""
    store = context.open_store(step.location)
    index = CacheIndex.load(store)
    if index is None:
        raise InvalidInput("NotPrepared", f"{store.uri} holds no contexts: run the prepare step first")
    numbers = range(context.completion_index, len(index.shards), step.completions)
    rows = sum(index.shards[number].rows for number in numbers)
    missing = [
        number for number in numbers if not is_stored(store, number, index.shards[number].rows, index.rows_per_shard)
    ]
    stored = rows - sum(index.shards[number].rows for number in missing)
    context.reporter.update(tokens=stored, total_tokens=rows, shards_complete=len(numbers) - len(missing))
    if missing:
        _Worker(step, context, store, index, load_model(index), device).write(missing, done=stored)
    return StepResult(
        step="cache",
        exit_code=ExitCode.DONE,
        reason="Completed",
        message=f"{len(numbers)} shards are stored, {len(missing)} of them written now",
        tokens=rows,
        shards_complete=len(numbers),
        shards_total=len(numbers),
    )


class _Worker:
    """Writes shards with one model."""

    def __init__(
        self,
        step: CacheStep,
        context: StepContext,
        store: ObjectStore,
        index: CacheIndex,
        model: ActivationModel,
        device: str,
    ) -> None:
        self._spec = step.spec
        self._context = context
        self._store = store
        self._index = index
        self._model = model
        self._device = device
        self._contexts = ContextReader(store, index)
        self._excluded = index.tokenizer.special_token_ids if step.spec.sampling.exclude_special_tokens else []
        self._dtype = STORAGE_DTYPES[step.spec.storage.dtype]
        self._copies = HostCopy()
        self._sink_filter = self._calibrate()

    def write(self, numbers: list[int], *, done: int) -> None:
        """Write these shards; `done` rows are stored already."""
        complete = self._context.reporter.state.shards_complete or 0
        writer = ShardWriter(
            self._store,
            hooks={hook.name: self._index.model.d_in[hook.name] for hook in self._spec.hooks},
            dtype=self._dtype,
            seed=self._spec.seed,
            rows_per_shard=self._index.rows_per_shard,
            software=software_versions(),
            device=self._device,
        )
        with writer:
            for number in numbers:
                shard = writer.begin(number, self._index.shards[number].rows)
                for rows in self._fill(shard):
                    done += rows
                    self._context.reporter.update(tokens=done, shards_complete=complete + writer.stored)
                writer.finish(shard, self._sink_filter.median_norms)
        self._context.reporter.update(shards_complete=complete + writer.stored)

    def _fill(self, shard: OpenShard) -> Iterator[int]:
        """Run the model until a shard is full; yields how many rows each batch gave."""
        plan = self._index.shards[shard.number]
        batches = harvest(
            self._model,
            self._batches(plan.start, plan.stop),
            sink_filter=self._sink_filter,
            excluded=self._excluded,
            dtype=self._dtype,
            copies=self._copies,
        )
        for batch in batches:
            yield shard.add(batch)
            if shard.full:
                return
        raise InvalidInput(
            "TooFewRows",
            f"the norm filter leaves only {shard.filled} of {shard.rows} rows of shard {shard.number}, and drops "
            f"{shard.dropped}: raise maxNormRatio, or set it to 0",
            field="spec.sampling.maxNormRatio",
        )

    def _batches(self, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        size = self._spec.model.batch_size
        for first in range(start, stop, size):
            if self._context.should_stop():
                raise Stopped("asked to stop: the shards that were finished are stored and will not be written again")
            yield first, self._contexts.read(first, min(first + size, stop))

    def _calibrate(self) -> SinkFilter:
        """Median norms over the cache's first batch: every worker finds the same."""
        ratio = self._spec.sampling.max_norm_ratio
        if ratio == 0:
            return SinkFilter(0, {})
        tokens = self._contexts.read(0, min(self._spec.model.batch_size, self._index.contexts))
        usable = usable_positions(tokens, self._excluded)
        return SinkFilter.calibrate(self._model.activations(tokens), usable, ratio)


def software_versions() -> dict[str, str]:
    """Versions of what determines the activations' last bits."""
    found = {}
    for name in SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # Run from a source tree, or with a model that needs no such library.
            continue
    return found
