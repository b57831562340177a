"""Defaults of a training job, resolved from its spec and its cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_job.errors import InvalidInput
from sae_job.training.plan import (
    TrainingPlan,
    default_batch_size,
    default_dead_after_tokens,
    default_learning_rate,
    resolve_plan,
    tokens_asked_for,
)
from sae_job.training.scaling import activation_scale
from sae_operator.api.training_job import SAETrainingJobSpec


@dataclass
class Statistics:
    d_in: int = 4
    mean: list[float] = field(default_factory=lambda: [3.0, 0.0, 0.0, 0.0])
    mean_norm: float = 4.0
    mean_squared_norm: float = 25.0


def plan(
    cache_rows: int = 1_000_000, hooks: tuple[str, ...] = ("layer",), *, width: int = 4, **spec: Any
) -> TrainingPlan:
    document = {
        "activations": {"uri": "file://cache"},
        "saes": [{"name": "a", "architecture": {"type": "topk", "k": 2}}],
        "output": {"uri": "file://out"},
        **spec,
    }
    return resolve_plan(
        SAETrainingJobSpec.model_validate(document),
        cache_rows=cache_rows,
        widths=dict.fromkeys(hooks, width),
    )


def refused(**spec: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        plan(**spec)
    return caught.value


@pytest.mark.parametrize(
    ("tokens", "size"),
    [(1, 256), (156_000, 256), (512_000, 512), (511_999, 256), (2_048_000, 2048), (300_000_000, 4096)],
)
def test_batch_size_leaves_a_thousand_steps(tokens: int, size: int) -> None:
    assert default_batch_size(tokens) == size


def test_learning_rate_goes_through_the_measured_points() -> None:
    assert default_learning_rate(256, 1390, "topk") == pytest.approx(1e-3)
    assert default_learning_rate(512, 695, "topk") == pytest.approx(2e-3)
    assert default_learning_rate(2048, 174, "topk") == pytest.approx(4e-3)
    assert default_learning_rate(256, 1390, "standard") == pytest.approx(1.7e-3)
    assert default_learning_rate(1024, 1465, "standard") == pytest.approx(2.3e-3)


@given(st.integers(1, 10**9), st.integers(1, 10**6), st.sampled_from(["topk", "standard"]))
def test_learning_rate_falls_with_steps_and_rises_with_the_batch(batch: int, steps: int, architecture: str) -> None:
    rate = default_learning_rate(batch, steps, architecture)
    assert 0 < rate <= 4e-3
    assert default_learning_rate(batch, steps + 1, architecture) <= rate
    assert rate <= default_learning_rate(batch + 1, steps, architecture)


def test_defaults() -> None:
    resolved = plan(cache_rows=176_000)
    assert resolved.held_out_rows == 17_600
    assert resolved.batch_size == 256
    assert resolved.steps == math.ceil(158_400 / 256)
    assert resolved.checkpoint_every_seconds == 600
    (sae,) = resolved.saes
    assert (sae.hook, sae.d_in, sae.d_sae) == ("layer", 4, 32)
    assert sae.learning_rate.decay_steps == resolved.steps // 5
    assert sae.betas == (0.9, 0.999)


def test_a_large_cache_holds_twenty_thousand_rows_out() -> None:
    assert plan(cache_rows=10**7).held_out_rows == 20_000


def test_tokens_asked_for_are_trained_on_in_whole_batches() -> None:
    resolved = plan(training={"tokens": 1000, "batchSize": 256})
    assert (resolved.steps, resolved.tokens) == (4, 1024)
    assert resolved.saes[0].learning_rate.total_steps == 4
    assert resolved.saes[0].learning_rate(3) > 0


def test_an_sae_replaces_settings_of_the_job() -> None:
    saes = [
        {"name": "a", "architecture": {"type": "topk", "k": 2}, "training": {"learningRate": 0.5, "adamBeta1": 0.0}},
        {"name": "b", "architecture": {"type": "topk", "k": 2}, "dSae": 7},
    ]
    first, second = plan(saes=saes, training={"learningRate": 0.1}).saes
    assert (first.learning_rate.peak, first.betas) == (0.5, (0.0, 0.999))
    assert (second.learning_rate.peak, second.betas) == (0.1, (0.9, 0.999))
    assert (first.d_sae, second.d_sae) == (32, 7)


@given(st.integers(1, 400), st.integers(1, 30))
def test_evaluations_are_at_each_tenth_and_at_the_end(steps: int, batch: int) -> None:
    resolved = plan(cache_rows=10**6, training={"tokens": steps * batch, "batchSize": batch})
    evaluated = [done for done in range(1, steps + 1) if resolved.evaluates_after(done)]
    assert evaluated == sorted({math.ceil(steps * part / 10) for part in range(1, 11)})


def test_evaluations_every_so_many_tokens_keep_the_first_tenth_and_the_end() -> None:
    resolved = plan(training={"tokens": 100, "batchSize": 1}, evaluation={"everyTokens": 30})
    assert [done for done in range(1, 101) if resolved.evaluates_after(done)] == [10, 30, 60, 90, 100]


def test_checkpoints_every_so_many_tokens_leave_the_end_to_the_results() -> None:
    resolved = plan(training={"tokens": 320, "batchSize": 4}, checkpoints={"everyTokens": 80})
    assert [done * 4 for done in range(1, 81) if resolved.checkpoints_after(done)] == [80, 160, 240]
    assert resolved.checkpoint_every_seconds is None


def test_last_step_is_logged() -> None:
    resolved = plan(training={"tokens": 25, "batchSize": 1})
    assert [done for done in range(1, 26) if resolved.logs_after(done)] == [10, 20, 25]


def test_hook_may_be_left_out_only_when_there_is_one() -> None:
    error = refused(hooks=("x", "y"))
    assert (error.reason, error.field) == ("HookMissing", "spec.saes[0].hook")
    sae = {"name": "a", "hook": "z", "architecture": {"type": "topk", "k": 2}}
    error = refused(hooks=("x", "y"), saes=[sae])
    assert error.reason == "HookNotFound"
    assert error.message == "there are no activations of 'z', but of x, y: name one of these"
    error = refused(hooks=("x", "y"), saes=[sae], activations={"cacheRef": {"name": "shared"}})
    assert "add it to spec.hooks of ActivationCache 'shared', or name one of these" in error.message


def test_k_is_compared_with_latents_that_follow_from_the_width() -> None:
    sae = {"name": "a", "architecture": {"type": "topk", "k": 9}, "expansionFactor": 2}
    assert refused(saes=[sae]).field == "spec.saes[0].architecture.k"


@pytest.mark.parametrize(
    ("training", "field_path"),
    [
        ({"warmUpSteps": 11}, "spec.training.warmUpSteps"),
        ({"warmUpSteps": 6, "decaySteps": 5}, "spec.training.decaySteps"),
        (
            {"learningRateSchedule": "cosineannealingwarmrestarts", "restartCycles": 9},
            "spec.training.restartCycles",
        ),
    ],
)
def test_phases_must_fit_into_the_steps(training: dict[str, Any], field_path: str) -> None:
    assert refused(training={"tokens": 10, "batchSize": 1, **training}).field == field_path


def test_default_decay_makes_room_for_a_long_warm_up() -> None:
    resolved = plan(training={"tokens": 10, "batchSize": 1, "warmUpSteps": 9})
    assert resolved.saes[0].learning_rate.decay_steps == 1


def test_some_rows_must_be_left_to_train_on() -> None:
    error = refused(cache_rows=100, evaluation={"heldOutTokens": 100})
    assert error.field == "spec.evaluation.heldOutTokens"


def test_scales() -> None:
    # sqrt(4) / sqrt(25 - 9), sqrt(4) / 4, and none.
    assert activation_scale(Statistics(), "centered_rms") == pytest.approx(0.5)
    assert activation_scale(Statistics(), "expected_average_only_in") == pytest.approx(0.5)
    assert activation_scale(Statistics(mean_norm=8.0), "expected_average_only_in") == pytest.approx(0.25)
    assert activation_scale(Statistics(), "none") == 1.0


def test_scales_follow_from_the_statistics_of_each_hook() -> None:
    saes = [{"name": hook, "hook": hook, "architecture": {"type": "topk", "k": 2}} for hook in "xy"]
    statistics = {"x": Statistics(), "y": Statistics(mean_norm=8.0)}
    resolved = plan(hooks=("x", "y"), saes=saes, normalization="expected_average_only_in")
    assert resolved.needs_statistics
    assert [sae.scale for sae in resolved.scaled_by(statistics).saes] == pytest.approx([0.5, 0.25])


@pytest.mark.parametrize("mode", ["none", "constant_norm_rescale", "layer_norm"])
def test_what_needs_no_statistics_has_no_scale(mode: Any) -> None:
    resolved = plan(normalization=mode)
    assert not resolved.needs_statistics
    assert resolved.scaled_by({"layer": Statistics()}).saes[0].scale == 1.0


def test_layer_norm_of_one_dimension_is_refused() -> None:
    assert refused(width=1, normalization="layer_norm").field == "spec.normalization"
    assert plan(width=2, normalization="layer_norm").saes[0].scale == 1.0


def test_a_plan_takes_over_the_scales_that_a_training_began_with() -> None:
    began = plan().record()
    began["saes"]["a"]["scale"] = 0.25
    assert plan().with_scales_of(began).saes[0].scale == 0.25
    assert plan().with_scales_of(began).record() == began


@pytest.mark.parametrize("squared", [9.0, math.nan, math.inf])
def test_activations_that_do_not_vary_are_refused(squared: float) -> None:
    with pytest.raises(InvalidInput) as caught:
        activation_scale(Statistics(mean_squared_norm=squared), "centered_rms")
    assert caught.value.field == "spec.normalization"


TWO = {"x": 4, "y": 6}
TOPK = {"type": "topk", "k": 2}


def transcoder(**changes: Any) -> dict[str, Any]:
    return {"name": "a", "hook": "x", "targetHook": "y", "architecture": TOPK, **changes}


def planned(widths: dict[str, int] | None = None, ranks: int = 1, **spec: Any) -> TrainingPlan:
    document = {"activations": {"uri": "file://cache"}, "saes": [transcoder()], "output": {"uri": "file://out"}, **spec}
    parsed = SAETrainingJobSpec.model_validate(document)
    return resolve_plan(parsed, cache_rows=10**6, widths=widths or TWO, ranks=ranks)


def test_a_transcoder_reads_one_hook_and_reconstructs_another() -> None:
    resolved = planned(saes=[transcoder(), {"name": "b", "hook": "x", "architecture": TOPK}])
    first, second = resolved.saes
    assert (first.hook, first.target_hook, first.d_in, first.d_out, first.d_sae) == ("x", "y", 4, 6, 32)
    assert first.is_transcoder
    assert (second.target_hook, second.d_out) == ("x", 4)
    assert not second.is_transcoder
    assert resolved.hooks == ("x", "y")


def test_each_hook_has_one_scale() -> None:
    statistics = {"x": Statistics(), "y": Statistics(d_in=6, mean_norm=12.0)}
    resolved = planned(normalization="expected_average_only_in").scaled_by(statistics)
    assert resolved.scales == pytest.approx({"x": 0.5, "y": math.sqrt(6) / 12})
    assert planned().with_scales_of(resolved.record()).scales == resolved.scales


def test_a_target_that_is_not_there_is_told() -> None:
    with pytest.raises(InvalidInput) as caught:
        planned(saes=[transcoder(targetHook="z")])
    assert (caught.value.reason, caught.value.field) == ("HookNotFound", "spec.saes[0].targetHook")


@pytest.mark.parametrize("mode", ["constant_norm_rescale", "layer_norm"])
def test_a_transcoder_cannot_have_a_normalisation_of_each_activation(mode: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        planned(normalization=mode)
    assert caught.value.field == "spec.normalization"


@pytest.mark.parametrize(
    ("architecture", "field_name"),
    [
        ({"type": "topk", "k": 9}, "k"),
        ({"type": "batchtopk", "k": 9}, "k"),
        ({"type": "matryoshka_batchtopk", "k": 2, "widths": [4, 4]}, "widths"),
        ({"type": "matryoshka_batchtopk", "k": 2, "widths": [6, 4]}, "widths"),
        ({"type": "matryoshka_batchtopk", "k": 2, "widths": [4, 9]}, "widths"),
        ({"type": "jumprelu", "l0Coefficient": 1, "sparsityPenalty": "target_l0", "targetL0": 9}, "targetL0"),
    ],
)
def test_settings_are_compared_with_latents_that_follow_from_the_width(
    architecture: dict[str, Any], field_name: str
) -> None:
    saes = [
        {"name": "fine", "architecture": TOPK},
        {"name": "a", "architecture": architecture, "expansionFactor": 2},
    ]
    assert refused(saes=saes).field == f"spec.saes[1].architecture.{field_name}"


def test_ranks_share_batches_evenly() -> None:
    assert planned(ranks=4, training={"batchSize": 12}).batch_size == 12
    with pytest.raises(InvalidInput) as caught:
        planned(ranks=8, training={"batchSize": 12})
    assert caught.value.field == "spec.training.batchSize"
    assert "set it to 16" in caught.value.message


def test_finetuning_comes_after_the_tokens_of_the_training() -> None:
    training = {"tokens": 100, "batchSize": 10, "learningRate": 0.5, "finetuning": {"method": "scale", "tokens": 35}}
    resolved = planned(training=training)
    assert (resolved.training_steps, resolved.steps, resolved.tokens) == (10, 14, 140)
    assert [resolved.is_finetuning(step) for step in (9, 10)] == [False, True]
    assert resolved.evaluates_after(10)
    (sae,) = resolved.saes
    assert sae.learning_rate(10) == 0
    assert sae.finetuning_rate is not None
    assert [sae.finetuning_rate(step) for step in range(4)] == pytest.approx([0.05, 0.0375, 0.025, 0.0125])
    spec = SAETrainingJobSpec.model_validate(
        {
            "activations": {"uri": "file://cache"},
            "saes": [transcoder()],
            "output": {"uri": "file://out"},
            "training": training,
        }
    )
    assert tokens_asked_for(spec) == 135


@pytest.mark.parametrize(
    ("tokens", "batch_size", "expected"),
    [(360_000, 256, 7_200), (40_000_000, 4096, 800_000), (50_000_000, 4096, 1_000_000), (600, 32, 320)],
)
def test_a_latent_counts_as_dead_after_a_fiftieth_of_the_training(tokens: int, batch_size: int, expected: int) -> None:
    assert default_dead_after_tokens(tokens, batch_size) == expected
