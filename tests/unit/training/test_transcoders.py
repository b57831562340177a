"""Transcoders: the input of one hook, the target of another, each scaled by its own statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sae_job.activations.manifest import read_manifest
from sae_job.activations.reader import CachedActivations
from sae_job.errors import InvalidInput
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS
from sae_job.storage.file_store import FileStore
from sae_job.training.scaling import activation_scale
from sae_job.training.trainer import Trainer
from tests.small_training import EVERY_KIND, TRAINING

TRANSCODER = EVERY_KIND["transcoder"]


def held_out(store: FileStore, trainer: Trainer) -> dict[str, torch.Tensor]:
    reader = CachedActivations.open(store, hooks=trainer.plan.hooks, batch_size=32, seed=0, held_out_contexts=5)
    rows = reader.held_out(trainer.plan.held_out_rows).activations
    reader.close()
    return rows


def run(trainer: Trainer) -> Trainer:
    while not trainer.finished:
        trainer.step()
    return trainer


def test_each_hook_is_scaled_by_its_own_statistics(two_hooks: FileStore, new_trainer: Callable[..., Trainer]) -> None:
    plan = new_trainer([TRANSCODER]).plan
    assert plan.hooks == ("layer", "other")
    statistics = read_manifest(two_hooks)
    (sae,) = plan.saes
    assert (sae.d_in, sae.d_out) == (6, 5)
    assert sae.scale == activation_scale(statistics.hook("layer"), "centered_rms")
    assert sae.target_scale == activation_scale(statistics.hook("other"), "centered_rms")
    assert sae.scale != sae.target_scale


def test_figures_are_of_the_target_in_raw_scale(two_hooks: FileStore, new_trainer: Callable[..., Trainer]) -> None:
    trainer = run(new_trainer([TRANSCODER], training={**TRAINING, "tokens": 1600}))
    rows = held_out(two_hooks, trainer)
    (sae,) = trainer.saes
    reconstruction = sae.inference()(rows["layer"])
    target = rows["other"].double()
    squared = float((reconstruction.double() - target).square().sum())
    told = trainer.record.last_evaluation("transcoder")
    assert told["mse"] == pytest.approx(squared / 40, rel=1e-5)
    spread = float((target - target.mean(dim=0)).square().sum())
    assert told["explained_variance"] == pytest.approx(1 - squared / spread, rel=1e-5)


def test_it_learns_a_map_between_two_hooks(two_hooks: FileStore, new_trainer: Callable[..., Trainer]) -> None:
    """The two hooks have nothing to do with each other but their means: what it can learn is the target's mean, and no
    more than an SAE on the target itself can it explain."""
    training = {**TRAINING, "tokens": 3200}
    alone = {**TRANSCODER, "name": "alone", "hook": "other", "targetHook": None, "skipConnection": False}
    trainer = run(new_trainer([TRANSCODER, alone], training=training))
    mapped, own = (trainer.record.last_evaluation(name)["explained_variance"] for name in ("transcoder", "alone"))
    assert mapped is not None
    assert own is not None
    assert -0.5 < mapped < 0.3 < own


def test_a_saved_one_tells_both_hooks(new_trainer: Callable[..., Trainer]) -> None:
    (sae,) = new_trainer([TRANSCODER]).saes
    cfg = sae.inference().cfg
    assert (cfg.hook_name, cfg.hook_name_out) == ("layer", "other")
    assert (cfg.d_in, cfg.width_out) == (6, 5)


@pytest.mark.parametrize("mode", RUN_TIME_NORMALIZATIONS)
def test_a_normalisation_that_its_outputs_cannot_undo_is_refused(
    new_trainer: Callable[..., Trainer], mode: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        new_trainer([EVERY_KIND["topk"], TRANSCODER], normalization=mode)
    assert caught.value.field == "spec.normalization"
    assert caught.value.message.startswith(f"saes[1] is a transcoder, and {mode} cannot be undone")
    assert new_trainer([EVERY_KIND["topk"]], normalization=mode).plan.scales == {"layer": 1.0}


@pytest.mark.parametrize("mode", ["none", "expected_average_only_in"])
def test_others_serve(new_trainer: Callable[..., Trainer], mode: str) -> None:
    trainer = run(new_trainer([TRANSCODER], normalization=mode))
    assert trainer.saes[0].failure is None
