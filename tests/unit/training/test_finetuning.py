"""The fine-tuning phase: frozen encoders, an exact switch, and the reconstruction loss alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sae_job.saes.trainable import StepInput
from sae_job.storage.file_store import FileStore
from sae_job.training.continuation import continues
from sae_job.training.finetuning import Finetuning
from sae_job.training.trainer import Trainer
from tests.small_training import EVERY_KIND, TRAINING, SmallJob, small_job, small_spec

METHODS = ("scale", "decoder", "unrotated_decoder")


def finetuned(method: str, tokens: int = 320, **more: Any) -> dict[str, Any]:
    return {**TRAINING, "tokens": 320, "finetuning": {"method": method, "tokens": tokens, **more}}


def begun(two_hooks: FileStore, jobs: list[SmallJob], saes: list[dict[str, Any]], **parts: Any) -> Trainer:
    jobs.append(small_job(two_hooks, small_spec(saes, **parts)))
    jobs[-1].trainer.initialize()
    return jobs[-1].trainer


def run_to(trainer: Trainer, steps: int) -> dict[str, dict[str, torch.Tensor]]:
    while trainer.steps_done < steps:
        trainer.step()
    return {sae.name: sae.tensors() for sae in trainer.saes}


@pytest.mark.parametrize("method", METHODS)
def test_encoders_and_what_the_method_leaves_out_stay_as_they_are(
    two_hooks: FileStore, jobs: list[SmallJob], method: str
) -> None:
    trained = {"scale": set[str](), "decoder": {"W_dec"}, "unrotated_decoder": set[str]()}[method]
    trainer = begun(two_hooks, jobs, list(EVERY_KIND.values()), training=finetuned(method))
    before, after = run_to(trainer, 10), run_to(trainer, 20)
    for name, tensors in before.items():
        assert not any(key.startswith("finetuning.") for key in tensors), name
        weights = {key: tensor for key, tensor in tensors.items() if key.startswith("weights.")}
        changed = {key for key, tensor in weights.items() if not torch.equal(tensor, after[name][key])}
        assert changed == {f"weights.{key}" for key in trained}, name
        factors = after[name]["finetuning.finetuning_scaling_factor"]
        assert not torch.equal(factors, torch.ones_like(factors))
        moved = not torch.equal(after[name]["finetuning.b_dec"], tensors["weights.b_dec"])
        assert moved == (method != "scale")


def test_a_decoder_at_unit_norm_keeps_it(two_hooks: FileStore, jobs: list[SmallJob]) -> None:
    unit_norm = {**EVERY_KIND["standard"], "normalizeDecoder": True}
    trainer = begun(two_hooks, jobs, [unit_norm], training=finetuned("decoder"))
    norms = torch.linalg.vector_norm(run_to(trainer, 20)["standard"]["weights.W_dec"], dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("method", METHODS)
def test_latents_of_the_saved_sae_fire_as_before(two_hooks: FileStore, jobs: list[SmallJob], method: str) -> None:
    """Also where the encoder subtracts a b_dec that was trained: its biases take up the difference."""
    rows = 2 + torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    trainer = begun(two_hooks, jobs, list(EVERY_KIND.values()), training=finetuned(method))
    run_to(trainer, 10)
    before = {sae.name: sae.inference() for sae in trainer.saes}
    run_to(trainer, 20)
    for sae in trainer.saes:
        after = sae.inference()
        if method != "scale":
            assert not torch.equal(after.b_dec, before[sae.name].b_dec)
        torch.testing.assert_close(after.encode(rows), before[sae.name].encode(rows), rtol=1e-4, atol=1e-4)
        assert after.cfg.finetuning_scaling_factor
        assert after.finetuning_scaling_factor.shape == (sae.plan.d_sae,)


def test_exporting_changes_nothing_of_the_training(two_hooks: FileStore, jobs: list[SmallJob]) -> None:
    trainer = begun(two_hooks, jobs, [EVERY_KIND["gated"]], training=finetuned("decoder"))
    before = run_to(trainer, 15)["gated"]
    trainer.saes[0].inference()
    after = trainer.saes[0].tensors()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_switch_is_exact_and_the_rate_begins_anew(two_hooks: FileStore, jobs: list[SmallJob]) -> None:
    """320 tokens in batches of 32 are 10 steps: the eleventh is the first of the fine-tuning."""
    training = {**finetuned("scale", 128, learningRate=0.4), "logEverySteps": 1}
    trainer = begun(two_hooks, jobs, [EVERY_KIND["standard"]], training=training)
    run_to(trainer, 14)
    assert trainer.finished
    lines = [line for line in trainer.record.lines if "loss" in line]
    assert [line.get("phase") for line in lines] == [None] * 10 + ["finetuning"] * 4
    assert [line["learning_rate"] for line in lines[10:]] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert all("l1_loss" in line for line in lines[:10])
    assert all(line["loss"] == line["mse_loss"] for line in lines[10:])
    assert all("l1_loss" not in line for line in lines[10:])


def test_the_rate_is_a_tenth_of_the_peak_when_none_is_named(two_hooks: FileStore, jobs: list[SmallJob]) -> None:
    trainer = begun(two_hooks, jobs, [EVERY_KIND["standard"]], training=finetuned("scale"))
    schedule = trainer.plan.saes[0].finetuning_rate
    assert schedule is not None
    assert schedule(0) == pytest.approx(0.001)
    assert schedule(9) == pytest.approx(0.0001)


def test_tokens_and_steps_are_of_both_phases(two_hooks: FileStore, jobs: list[SmallJob]) -> None:
    plan = begun(two_hooks, jobs, [EVERY_KIND["topk"]], training=finetuned("scale", tokens=100)).plan
    assert (plan.training_steps, plan.steps, plan.tokens) == (10, 14, 448)
    assert plan.saes[0].learning_rate.total_steps == 10


def test_it_undoes_shrinkage(two_hooks: FileStore, jobs: list[SmallJob]) -> None:
    """A strong penalty shrinks activations; factors above one bring the reconstruction back."""
    sae = {**EVERY_KIND["standard"], "architecture": {"type": "standard", "l1Coefficient": 1.0}}
    trainer = begun(two_hooks, jobs, [sae], training={**finetuned("scale", 1600, learningRate=0.02), "tokens": 1600})
    tensors = run_to(trainer, 100)["standard"]
    at_switch = trainer.record.evaluation_after(50, "standard")["mse"]
    at_end = trainer.record.last_evaluation("standard")["mse"]
    assert at_switch is not None
    assert at_end is not None
    assert at_end < at_switch
    counts = tensors["frequency.window_counts"].sum(dim=0)
    factors = tensors["finetuning.finetuning_scaling_factor"]
    assert float((factors * counts).sum() / counts.sum()) > 1


@pytest.mark.parametrize("name", list(EVERY_KIND))
def test_gradients_are_those_of_the_written_loss(two_hooks: FileStore, jobs: list[SmallJob], name: str) -> None:
    """Against automatic differentiation of the formula, in the features that the frozen encoder gives."""
    trainer = begun(two_hooks, jobs, [EVERY_KIND[name]], training=TRAINING)
    run_to(trainer, 5)
    (training,) = trainer.saes
    trainable = training._trainable
    fine = Finetuning(trainable, "decoder", ranks=training._ranks)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        fine.finetuning_scaling_factor.uniform_(0.5, 2, generator=generator)
        fine.b_dec.normal_(generator=generator)
    x = torch.randn(30, 6, generator=generator)
    target = torch.randn(30, trainable.d_out, generator=generator)
    statistics = fine.step_gradients(StepInput(x, target, 0))
    features = trainable.active_latents(x).dense()
    W_dec, factors, b_dec = (
        tensor.detach().clone().requires_grad_()
        for tensor in (trainable.W_dec, fine.finetuning_scaling_factor, fine.b_dec)
    )
    reconstruction = (features * factors) @ W_dec + b_dec
    if trainable.W_skip is not None:
        reconstruction = reconstruction + x @ trainable.W_skip.detach().T
    loss = (reconstruction - target).square().sum() / 30
    loss.backward()
    torch.testing.assert_close(statistics.loss, loss.detach())
    for ours, theirs in ((trainable.W_dec, W_dec), (fine.finetuning_scaling_factor, factors), (fine.b_dec, b_dec)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(statistics.fire_counts, (features > 0).sum(dim=0))


def test_a_finetuning_that_has_begun_cannot_be_put_off(two_hooks: FileStore, jobs: list[SmallJob]) -> None:
    trainer = begun(two_hooks, jobs, [EVERY_KIND["topk"]], training=finetuned("scale"))
    run_to(trainer, 10)
    before = trainer.snapshot({}).state
    run_to(trainer, 11)
    after = trainer.snapshot({}).state
    longer = {**finetuned("scale"), "tokens": 640}
    plan = begun(two_hooks, jobs, [EVERY_KIND["topk"]], training=longer).plan
    assert continues(plan, before)
    assert not continues(plan, after)
    assert continues(trainer.plan, after)


def test_a_rate_that_breaks_it_is_told_as_such(two_hooks: FileStore, jobs: list[SmallJob]) -> None:
    saes = [EVERY_KIND["topk"], EVERY_KIND["standard"]]
    trainer = begun(two_hooks, jobs, saes, training=finetuned("decoder", learningRate=1e9))
    run_to(trainer, 10)
    trainer.saes[0]._begin_finetuning()
    fine = trainer.saes[0]._finetuning
    assert fine is not None
    with torch.no_grad():
        fine.b_dec[0] = math.inf
    trainer.step()
    failure = trainer.saes[0].failure
    assert failure is not None
    assert "from step 10 of 20" in failure
    assert "lower spec.training.finetuning.learningRate, e.g. to 1e+08" in failure
