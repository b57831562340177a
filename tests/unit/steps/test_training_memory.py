"""What a training pod needs, part by part, and what is refused where its limit is too low."""

from __future__ import annotations

from typing import Any

import pytest

from sae_job.errors import InvalidInput
from sae_job.steps.memory import PROCESS_BYTES
from sae_job.steps.training_memory import TrainingMemory, parameters_of
from sae_job.training.plan import TrainingPlan, resolve_plan
from sae_operator.api.training_job import SAETrainingJobSpec
from tests.small_training import small_spec

D_IN, D_OUT, D_SAE, BATCH = 8, 6, 64, 32
MIB = 2**20


def plan_of(*saes: dict[str, Any], **parts: Any) -> TrainingPlan:
    spec = small_spec([{"name": f"sae{i}", "dSae": D_SAE, "hook": "a", **sae} for i, sae in enumerate(saes)], **parts)
    return resolve_plan(spec, cache_rows=1000, widths={"a": D_IN, "b": D_OUT})


def memory_of(*saes: dict[str, Any], **parts: Any) -> TrainingMemory:
    return TrainingMemory.of(plan_of(*saes, **parts), rows=1000)


TOPK = {"architecture": {"type": "topk", "k": 4}}


@pytest.mark.parametrize(
    ("sae", "expected"),
    [
        (TOPK, 2 * D_IN * D_SAE + D_SAE + D_IN),
        ({"architecture": {"type": "gated", "l1Coefficient": 1}}, 2 * D_IN * D_SAE + 3 * D_SAE + D_IN),
        ({"architecture": {"type": "jumprelu", "l0Coefficient": 1}}, 2 * D_IN * D_SAE + 2 * D_SAE + D_IN),
        ({**TOPK, "targetHook": "b"}, (D_IN + D_OUT + 1) * D_SAE + D_OUT),
        ({**TOPK, "targetHook": "b", "skipConnection": True}, (D_IN + D_OUT + 1) * D_SAE + D_OUT + D_IN * D_OUT),
    ],
    ids=["topk", "gated", "jumprelu", "transcoder", "skip transcoder"],
)
def test_parameters(sae: dict[str, Any], expected: int) -> None:
    assert parameters_of(plan_of(sae).saes[0]) == expected


def test_adam_keeps_two_moments_and_adafactor_next_to_nothing() -> None:
    adam, adafactor = memory_of(TOPK), memory_of(TOPK, training={"batchSize": BATCH, "optimizer": "adafactor"})
    assert adam.optimizer == 2 * adam.weights == 2 * adam.gradients
    assert adafactor.optimizer == 0


def test_weights_add_up_over_saes_and_step_buffers_do_not() -> None:
    one, two = memory_of(TOPK), memory_of(TOPK, TOPK)
    assert two.weights == 2 * one.weights
    assert two.step == one.step == 4 * BATCH * (D_SAE + D_IN)


def test_noise_is_one_more_array_of_all_latents() -> None:
    noisy = {"architecture": {**TOPK["architecture"], "noiseScale": 0.1}}
    assert memory_of(noisy).step == memory_of(TOPK).step + 4 * BATCH * D_SAE


def test_a_transcoder_holds_batches_of_both_hooks() -> None:
    assert memory_of({**TOPK, "targetHook": "b"}).step == 4 * BATCH * (D_SAE + D_IN + D_OUT)


def test_the_sum_counts_a_model_for_evaluation_beside_or_instead_of_the_rows() -> None:
    plan = plan_of(TOPK)
    alone = TrainingMemory.of(plan, rows=1000).total
    assert alone == PROCESS_BYTES + memory_of(TOPK).training + memory_of(TOPK).checkpoint + 1000
    assert TrainingMemory.of(plan, rows=1000, scored_model=900).total == alone
    assert TrainingMemory.of(plan, rows=1000, scored_model=1500).total == alone + 500
    assert TrainingMemory.of(plan, rows=1000, scored_model=900, scored_beside=True).total == alone + 900


def limited(limits: dict[str, Any], **parts: Any) -> SAETrainingJobSpec:
    return small_spec(run={"resources": {"limits": limits}}, **parts)


def test_a_limit_that_is_too_low_is_told_with_what_to_lower() -> None:
    memory = TrainingMemory.of(plan_of(TOPK), rows=200 * MIB)
    memory.check(limited({"memory": "300Mi"}))
    memory.check(limited({"memory": "100Mi", "nvidia.com/gpu": 1}))
    with pytest.raises(InvalidInput, match=r"200\.0 MiB, the limit is 100\.0 MiB; raise it") as refused:
        memory.check(limited({"memory": "100Mi"}))
    assert refused.value.field == "spec.run.resources.limits.memory"


def test_parts_that_are_there_have_a_line_each() -> None:
    lines = memory_of(TOPK).lines(gpu=True)
    assert [line.split("  ")[0] for line in lines] == [
        "weights",
        "gradients",
        "optimizer",
        "one step",
        "activations",
        "checkpoint",
        "process",
        "total",
    ]
    assert lines[0].endswith("(on the GPU)")
    assert "GPU" not in lines[4]


def test_each_process_of_a_pod_holds_saes_and_rows_of_its_own() -> None:
    one, eight = (TrainingMemory.of(plan_of(TOPK), rows=MIB, processes=processes) for processes in (1, 8))
    # One of them writes checkpoints, and all share the rows of a batch.
    shared = one.checkpoint + one.step
    assert eight.checkpoint + eight.step == shared
    assert eight.total - shared == 8 * (one.total - shared)
