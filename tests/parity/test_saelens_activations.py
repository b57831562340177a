"""Cached activations go to SAELens and come from it, value by value."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.peers import SAE_LENS_REFERENCE, peer_environment
from sae_job.activations.reader import CachedActivations
from sae_job.activations.saelens_export import CacheExport
from sae_job.activations.verify import verify_cache
from sae_job.steps.import_saelens import import_activations
from sae_job.storage.file_store import FileStore
from tests.caches import finished_cache

# Making the environment of a peer with pip takes minutes, once per machine.
pytestmark = pytest.mark.timeout(1800)

HOOK = "blocks.3.hook_resid_post"
D_IN, CONTEXT = 16, 8


def run_saelens(*arguments: str | Path, work: Path) -> None:
    script = Path(__file__).with_name("activations_with_saelens.py")
    command = [SAE_LENS_REFERENCE.python(), script, *arguments]
    done = subprocess.run(command, env=peer_environment(), cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_saelens_reads_what_is_exported(tmp_path: Path) -> None:
    store, manifest = finished_cache(tmp_path / "cache", hooks={HOOK: D_IN}, context_size=CONTEXT, tokens=700)
    export = CacheExport(store, manifest, HOOK)
    export.write(tmp_path / "set")
    run_saelens("read", tmp_path / "set", HOOK, tmp_path / "read.safetensors", work=tmp_path)
    theirs = load_file(tmp_path / "read.safetensors")

    ours = [torch.from_numpy(batch[0].copy()) for batch in export.batches()]
    token_ids = [torch.from_numpy(batch[1].copy()) for batch in export.batches()]
    assert torch.equal(theirs["activations"], torch.cat(ours).flatten(0, 1))
    assert torch.equal(theirs["token_ids"].int(), torch.cat(token_ids).flatten())
    # BOS at position 0 is dropped when caching.
    assert len(theirs["activations"]) == export.contexts * (CONTEXT - 1) > 600


def test_what_saelens_cached_is_imported(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(40, CONTEXT, D_IN, generator=generator)
    token_ids = torch.randint(1000, (40, CONTEXT), generator=generator, dtype=torch.int32)
    save_file({"activations": activations, "token_ids": token_ids}, tmp_path / "made.safetensors")
    run_saelens("write", tmp_path / "made.safetensors", HOOK, tmp_path / "set", work=tmp_path)

    store = FileStore(tmp_path / "cache")
    done = import_activations(tmp_path / "set", store, model="gpt2", dataset="text", shard_bytes=4096)
    assert len(done.manifest.shards) > 2
    assert verify_cache(store).problems == []
    reader = CachedActivations.open(store, hooks=[HOOK], batch_size=16, seed=0, held_out_contexts=40 // 2)
    held_out = reader.held_out(10**6)
    reader.close()
    assert torch.equal(held_out.activations[HOOK], activations[:20].flatten(0, 1))
    assert torch.equal(held_out.token_ids, token_ids[:20].flatten())
