"""Activations that the quality benchmark trains and evaluates on: made once, and the same float32 rows for every side.

The residual stream after layer 15 of SmolLM2-135M on English text (forward pass and cache in bfloat16, attention sinks
filtered as by default). The cache's first contexts are kept apart: the first of them for validation, the others for the
test. The remaining rows are written in the order in which the product's reader mixes them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sae_job.activations.contexts import ContextReader
from sae_job.activations.manifest import read_manifest
from sae_job.activations.reader import CachedActivations, held_out_contexts_for
from sae_job.models.load import load_hooked_model
from sae_job.steps.cache import write_shards
from sae_job.steps.finalize import run_finalize
from sae_job.steps.prepare import run_prepare
from sae_job.storage.file_store import FileStore, path_of_file_uri
from sae_job.text.plan import CacheIndex
from sae_operator.api.activation_cache import ActivationCacheSpec, CacheStorage, DatasetSource, Hook, ModelSource
from tests.caches import cache_step, step_context
from tests.testbed.data import ensure_english_text, ensure_small_model

HOOK = "model.layers.15"
CONTEXT_SIZE, MODEL_BATCH = 128, 16
SEED = 0
WRITE_ROWS = 4096


@dataclass(frozen=True)
class Rows:
    """How many rows there are of each kind, and how many tokens cross-entropies are taken of."""

    train: int
    validation: int
    test: int
    cross_entropy: int

    @property
    def held_out(self) -> int:
        return self.validation + self.test


FULL = Rows(train=356_352, validation=16_384, test=24_576, cross_entropy=4096)
QUICK = Rows(train=6_144, validation=1024, test=1024, cross_entropy=512)


@dataclass(frozen=True)
class QualityData:
    """Files that the sides read.

    Attributes:
        folder: holds `train.npy`, `validation.npy` and `test.npy`, float32 [rows, d_in] each, and the contexts of test
            rows.
    """

    folder: Path

    def rows(self, part: str) -> np.ndarray:
        """`train`, `validation` or `test`: float32 [rows, d_in], mapped from the file."""
        return np.load(self.folder / f"{part}.npy", mmap_mode="r")

    def contexts(self) -> dict[str, torch.Tensor]:
        """`tokens` int32 [contexts, context_size], `replaced` (whether a position is a test row) of the same shape,
        `ignored` int32 (ids of special tokens)."""
        return load_file(self.folder / "contexts.safetensors")

    def facts(self) -> dict[str, object]:
        return json.loads((self.folder / "facts.json").read_text())


def ensure_data(work: Path, rows: Rows) -> QualityData:
    """The data below `work`; makes what is not there."""
    data = QualityData(work / f"data-{rows.train}-{rows.validation}-{rows.test}")
    if not (data.folder / "facts.json").exists():
        _write(work, data.folder, rows)
    return data


def _write(work: Path, folder: Path, rows: Rows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    spec = ActivationCacheSpec(
        model=ModelSource(name=os.fspath(ensure_small_model()), dtype="bfloat16", batch_size=MODEL_BATCH),
        dataset=DatasetSource(path=os.fspath(ensure_english_text())),
        hooks=[Hook(name=HOOK)],
        context_size=CONTEXT_SIZE,
        # Contexts are held out whole, so that a few rows more than asked for are.
        tokens=rows.train + rows.held_out + CONTEXT_SIZE,
        storage=CacheStorage(uri=f"file://{work}/caches", shard_bytes=2**25),
    )
    store = _ensure_cache(spec)
    manifest = read_manifest(store)
    contexts = held_out_contexts_for(store, manifest, rows.held_out)
    reader = CachedActivations.open(store, hooks=[HOOK], batch_size=256, seed=SEED, held_out_contexts=contexts)
    held = reader.held_out(rows.held_out)
    values = held.activations[HOOK].float().numpy()
    # No context is in both parts.
    first = int(held.sequence[rows.validation])
    split = int((held.sequence < first).sum())
    np.save(folder / "validation.npy", values[:split])
    np.save(folder / "test.npy", values[split:])
    out = np.lib.format.open_memmap(
        folder / "train.npy", mode="w+", dtype=np.float32, shape=(rows.train, values.shape[1])
    )
    for start in range(0, rows.train, 256):
        out[start : start + 256] = reader.next_batch()[HOOK].float().numpy()
    out.flush()
    reader.close()

    index = CacheIndex.load(store)
    assert index is not None
    last = min(int(held.sequence.max()) + 1, first + rows.cross_entropy // CONTEXT_SIZE)
    tokens = ContextReader(store, index).read(first, last)
    replaced = torch.zeros(tokens.shape, dtype=torch.bool)
    inside = (held.sequence >= first) & (held.sequence < last)
    replaced[held.sequence[inside].long() - first, held.position[inside].long()] = True
    ignored = torch.tensor(sorted(index.tokenizer.special_token_ids), dtype=torch.int32)
    save_file({"tokens": tokens, "replaced": replaced, "ignored": ignored}, folder / "contexts.safetensors")
    facts = {
        "model": "SmolLM2-135M",
        "hook": HOOK,
        "forward_and_cache_dtype": "bfloat16",
        "context_size": CONTEXT_SIZE,
        "max_norm_ratio": spec.sampling.max_norm_ratio,
        "train_rows": rows.train,
        "validation_rows": split,
        "test_rows": len(values) - split,
        "cross_entropy_tokens": tokens.numel(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))


def _ensure_cache(spec: ActivationCacheSpec) -> FileStore:
    step = cache_step(spec)
    context = step_context()
    if not run_prepare(step.model_copy(update={"step": "prepare"}), context).adopted:
        model = load_hooked_model(spec.model, [HOOK], device="cpu")
        write_shards(step, context, lambda index: model, device="cpu")
        run_finalize(step.model_copy(update={"step": "finalize"}), context)
    return FileStore(path_of_file_uri(step.location.uri))
