"""What `training.compile` compiles: it works, a training goes on from a checkpoint to the same bits, and a pod without
a compiler is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._inductor.config

from sae_job.errors import InvalidInput
from sae_job.saes.architectures import build_trainable
from sae_job.storage.file_store import FileStore
from sae_job.training.compiled import CompiledUpkeep
from sae_operator.api.sae import SaeSpec
from tests.small_cache import write_small_cache
from tests.small_training import TRAINING, small_job, small_spec

TRANSPOSED = {"name": "a", "architecture": {"type": "topk", "k": 3}, "dSae": 24}


def test_a_compiled_training_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    write_small_cache(store)
    spec = small_spec([TRANSPOSED], training={**TRAINING, "compile": True})
    job = small_job(store, spec)
    job.trainer.initialize()
    for _ in range(7):
        job.trainer.step()
    snapshot = job.trainer.snapshot({})
    torch.compiler.reset()
    again = small_job(store, spec)
    again.trainer.restore(snapshot)
    for trainer in (job.trainer, again.trainer):
        while not trainer.finished:
            trainer.step()
    ours, theirs = (trainer.saes[0].tensors() for trainer in (again.trainer, job.trainer))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert again.trainer.record.lines == job.trainer.record.lines
    norms = torch.linalg.vector_norm(ours["weights.W_dec"], dim=1)
    torch.testing.assert_close(norms, torch.ones(24))
    for one in (job, again):
        one.reader.close()


def test_a_pod_without_a_compiler_is_told_which_field_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/such/compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    torch.compiler.reset()
    trainable = build_trainable(SaeSpec.model_validate({**TRANSPOSED, "dSae": 17}), 7, device="cpu")
    with torch.no_grad():
        trainable.parameters_by_name["W_dec"].fill_(1.0)
    with pytest.raises(InvalidInput) as caught:
        CompiledUpkeep(trainable).after_optimizer_step()
    assert caught.value.field == "spec.training.compile"
    assert "set compile: false" in caught.value.message
