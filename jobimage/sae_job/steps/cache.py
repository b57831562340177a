"""The cache step: one worker's share of the shards, from the contexts that prepare stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from sae_job.activations.base_rows import BaseRows
from sae_job.activations.codecs import CODECS
from sae_job.activations.filling import ShardFiller
from sae_job.activations.format import shard_key
from sae_job.activations.harvest import ActivationModel
from sae_job.activations.manifest import Sidecar
from sae_job.activations.open_shard import OpenShard
from sae_job.activations.stored_parts import PartLayouts, proved_parts
from sae_job.activations.writer import ShardWriter, shards_in_memory
from sae_job.errors import InvalidInput, Stopped
from sae_job.models.load import default_device
from sae_job.models.mirror import localized
from sae_job.steps.context import StepContext
from sae_job.storage.base import ObjectStore
from sae_job.text.plan import INDEX_KEY, CacheIndex, row_bytes
from sae_operator.api.steps import CacheStep, ExitCode, StepResult, TrainStep

SOFTWARE = ("sae-operator", "torch", "transformers")


def run_cache(step: CacheStep | TrainStep, context: StepContext) -> StepResult:
    """Write what is not stored yet of the shards i with i % completions == completion_index.

    Raises:
        InvalidInput: the contexts or a stored part are damaged, too few rows pass the norm filter, activations are
            not finite, or the cache was planned anew for other hooks meanwhile.
        Stopped: asked to stop; shards that were finished are stored.
    """
    if not isinstance(step, CacheStep):
        raise TypeError(f"the cache step is given a {type(step).__name__}")

    def load_model(index: CacheIndex, hooks: Sequence[str]) -> ActivationModel:
        model = localized(
            step.spec.model,
            open_store=context.open_store,
            mirror=context.open_store(step.location),
            revision=index.model.revision,
            should_stop=context.should_stop,
        )
        return model.load_hooked(hooks)

    device = torch.cuda.get_device_name() if default_device().type == "cuda" else "cpu"
    return _write_missing(step, context, load_model, device)


def write_shards(
    step: CacheStep, context: StepContext, load_model: Callable[[CacheIndex], ActivationModel], *, device: str
) -> StepResult:
    """As `run_cache`, with a model of the caller's that gives all hooks of the index; it is not loaded when there is
    nothing to write."""
    return _write_missing(step, context, lambda index, hooks: load_model(index), device)


def _write_missing(
    step: CacheStep,
    context: StepContext,
    load_model: Callable[[CacheIndex, Sequence[str]], ActivationModel],
    device: str,
) -> StepResult:
    store = context.open_store(step.location)
    there = store.head(INDEX_KEY)
    index = CacheIndex.load(store)
    if there is None or index is None:
        raise InvalidInput("NotPrepared", f"{store.uri} holds no contexts: run the prepare step first")
    layouts = PartLayouts(index, CODECS[step.spec.storage.dtype])
    numbers = range(context.completion_index, len(index.shards), step.completions)
    work: list[_ShardWork] = []
    for number, sidecars in zip(numbers, proved_parts(store, index, layouts, numbers), strict=True):
        groups = [group for group, sidecar in enumerate(sidecars) if sidecar is None]
        if groups:
            base = sidecars[0]
            work.append(_ShardWork(number, groups, None if base is None else base.without_sums()))
    rows = sum(index.shards[number].rows for number in numbers)
    stored = rows - sum(index.shards[shard.number].rows for shard in work)
    context.reporter.update(tokens=stored, total_tokens=rows, shards_complete=len(numbers) - len(work))
    if work:
        groups = sorted({group for shard in work for group in shard.groups})
        model = load_model(index, [hook for group in groups for hook in index.groups[group].hooks])
        plan = _FollowedPlan(store, index, there.etag)
        _Worker(step, context, store, plan, layouts, groups, model, device).write(work, done=stored)
    return StepResult(
        step="cache",
        exit_code=ExitCode.DONE,
        reason="Completed",
        message=f"{len(numbers)} shards are stored, {len(work)} of them written now",
        tokens=rows,
        shards_complete=len(numbers),
        shards_total=len(numbers),
    )


@dataclass(frozen=True)
class _ShardWork:
    """A shard of which the parts of some groups are missing; `base` is the sidecar of group 0's, where that is
    stored."""

    number: int
    groups: list[int]
    base: Sidecar | None


class _FollowedPlan:
    """The plan that a worker follows. Another resource that asks for other hooks may store another one meanwhile, and
    its workers write files of the same names: theirs, which may be finished by then, must not be replaced.

    Args:
        store: the cache's folder.
        index: the plan.
        etag: of the object that it was read from.
    """

    def __init__(self, store: ObjectStore, index: CacheIndex, etag: str) -> None:
        self.index = index
        self._store = store
        self._etag = etag

    def check(self, shard: OpenShard) -> None:
        """Raises InvalidInput when the plan that is there now means something else by the files of a shard's parts."""
        info = self._store.head(INDEX_KEY)
        if info is not None and info.etag == self._etag:
            return
        now = CacheIndex.load(self._store)
        if now is None or not all(self._same(now, shard.number, group) for group in shard.parts):
            raise InvalidInput(
                "PlanChanged",
                f"another cache resource has planned {self._store.uri} anew, for other hooks, or it was removed: raise "
                "spec.retry when nobody else writes there",
            )

    def _same(self, now: CacheIndex, number: int, group: int) -> bool:
        if number >= len(now.shards) or group >= len(now.groups):
            return True
        ours, theirs = self.index.shards[number], now.shards[number]
        if shard_key(number, ours.rows, self.index.rows_per_shard) != shard_key(
            number, theirs.rows, now.rows_per_shard
        ):
            return True
        return ours == theirs and all(self.index.groups[known] == now.groups[known] for known in {0, group})


class _Worker:
    """Writes shards with one model, which gives the hooks of `groups`."""

    def __init__(
        self,
        step: CacheStep,
        context: StepContext,
        store: ObjectStore,
        plan: _FollowedPlan,
        layouts: PartLayouts,
        groups: Sequence[int],
        model: ActivationModel,
        device: str,
    ) -> None:
        self._spec = step.spec
        self._context = context
        self._store = store
        self._plan = plan
        self._index = plan.index
        self._layouts = layouts
        self._device = device
        self._filler = ShardFiller(store, plan.index, step.spec, model, groups, before_batch=self._stop_if_asked)

    def write(self, work: Sequence[_ShardWork], *, done: int) -> None:
        """Write these shards; `done` rows are stored already."""
        complete = self._context.reporter.state.shards_complete or 0
        spec, index = self._spec, self._index
        row = max(
            sum(row_bytes(index.group_widths(group), spec.storage.dtype, group) for group in shard.groups)
            for shard in work
        )
        writer = ShardWriter(
            self._store,
            encoding=self._filler.encoding,
            seed=spec.seed,
            rows_per_shard=index.rows_per_shard,
            software=software_versions(),
            device=self._device,
            in_memory=shards_in_memory(spec.storage.buffer_bytes, min(index.tokens, index.rows_per_shard) * row),
            before_upload=self._plan.check,
        )
        with writer:
            for missing in work:
                rows = index.shards[missing.number].rows
                base = None if 0 in missing.groups else self._base_rows(missing.base)
                layouts = {group: self._layouts.of(rows, group) for group in missing.groups}
                shard = writer.begin(missing.number, rows, layouts, base=None if base is None else missing.base)
                for count in self._filler.fill(shard, base):
                    done += count
                    self._context.reporter.update(tokens=done, shards_complete=complete + writer.stored)
                writer.finish(shard)
                # Its buffer is another shard's when it is stored.
                del shard
        self._context.reporter.update(shards_complete=complete + writer.stored)

    def _base_rows(self, sidecar: Sidecar | None) -> BaseRows:
        assert sidecar is not None, "a shard whose first part is missing has that part written"
        return BaseRows.read(
            self._store,
            sidecar,
            self._layouts.of(sidecar.rows, 0),
            rows_per_shard=self._index.rows_per_shard,
            context_size=self._index.context_size,
        )

    def _stop_if_asked(self) -> None:
        if self._context.should_stop():
            raise Stopped("asked to stop: the shards that were finished are stored and will not be written again")


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
