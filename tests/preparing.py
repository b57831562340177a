"""Caches to prepare: the step on a small model and text, below a folder of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.errors import InvalidInput
from sae_job.reporting.progress import ProgressReporter
from sae_job.steps.context import StepContext
from sae_job.steps.prepare import run_prepare
from sae_job.storage.file_store import FileStore, path_of_file_uri
from sae_job.text.blocks import read_block
from sae_job.text.plan import CacheIndex
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.identity import cache_location
from sae_operator.api.steps import CacheStep, StepResult
from tests.faults import FaultPlan

CONTEXT_SIZE = 16


class Bench:
    """A cache's folder, and prepare on it."""

    def __init__(self, root: Path, inputs: tuple[Path, Path]) -> None:
        self.root, (self.model, self.text) = root, inputs

    def spec(self, *, tokens: int = 1500, **fields: Any) -> ActivationCacheSpec:
        storage = {"uri": f"file://{self.root}", "shardBytes": 32_000, **fields.pop("storage", {})}
        return ActivationCacheSpec.model_validate(
            {
                "model": {"name": str(self.model), "dtype": "float32"},
                "dataset": {"path": str(self.text)},
                "hooks": [{"name": "model.layers.1"}],
                "contextSize": CONTEXT_SIZE,
                "tokens": tokens,
                "storage": storage,
                **fields,
            }
        )

    def store(self, spec: ActivationCacheSpec) -> FileStore:
        return FileStore(path_of_file_uri(cache_location(spec, "team").uri))

    def prepare(
        self,
        spec: ActivationCacheSpec,
        *,
        faults: FaultPlan | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        def open_store(location: Any) -> Any:
            store = FileStore(path_of_file_uri(location.uri))
            return store if faults is None else faults.wrap(store)

        context = StepContext(
            reporter=ProgressReporter("prepare", clock=lambda: 0.0),
            should_stop=should_stop,
            open_store=open_store,
            now=lambda: 0.0,
        )
        location = cache_location(spec, "team")
        step = CacheStep(step="prepare", namespace="team", name="tiny", uid="u", spec=spec, location=location)
        return run_prepare(step, context)

    def refusal(self, spec: ActivationCacheSpec) -> tuple[str, str, str]:
        with pytest.raises(InvalidInput) as caught:
            self.prepare(spec)
        return caught.value.reason, caught.value.field, caught.value.message


def all_contexts(store: FileStore, index: CacheIndex) -> torch.Tensor:
    return torch.cat([read_block(store, number, sha256=block.sha256) for number, block in enumerate(index.blocks)])


def index_of(store: FileStore) -> CacheIndex:
    index = CacheIndex.load(store)
    assert index is not None
    return index
