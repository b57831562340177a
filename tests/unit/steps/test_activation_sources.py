"""Where a job's activations come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae_job.activations.marker import LAST_USED_KEY
from sae_job.errors import InvalidInput
from sae_job.steps.activation_sources import open_source
from sae_job.storage.file_store import FileStore
from sae_operator.api.steps import TrainStep
from sae_operator.api.store import StoreLocation
from sae_operator.api.training_job import SAETrainingJobSpec
from tests.caches import step_context
from tests.small_cache import write_small_cache


def job(folder: Path) -> TrainStep:
    spec = SAETrainingJobSpec.model_validate(
        {
            "activations": {"uri": f"file://{folder}"},
            "saes": [{"name": "k4", "architecture": {"type": "topk", "k": 4}}],
            "output": {"uri": f"file://{folder}-out"},
        }
    )
    return TrainStep(
        step="train",
        namespace="team",
        name="job",
        uid="u",
        spec=spec,
        activations=StoreLocation(uri=f"file://{folder}"),
    )


def test_a_cache_that_is_read_is_noted(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    manifest = write_small_cache(store)
    source = open_source(job(tmp_path), step_context(), device=torch.device("cpu"))
    assert (source.rows, source.widths) == (manifest.tokens, {"layer": 6})
    assert store.head(LAST_USED_KEY) is not None


def test_nothing_is_written_to_a_folder_that_is_no_cache(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("notes.txt", b"mine")
    with pytest.raises(InvalidInput, match="holds no finished cache"):
        open_source(job(tmp_path), step_context(), device=torch.device("cpu"))
    assert [info.key for info in store.list()] == ["notes.txt"]
