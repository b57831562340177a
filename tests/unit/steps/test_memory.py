"""What a cache worker needs, told before it starts, and refused where its pod cannot hold it."""

from __future__ import annotations

import pytest

from sae_job.errors import InvalidInput
from sae_job.steps.memory import PROCESS_BYTES, WorkerMemory
from sae_operator.api.activation_cache import ActivationCacheSpec
from tests.specs import CACHE_SPEC

MIB = 2**20


def spec(*, batch_size: int = 8, limits: dict[str, str] | None = None, **storage: int) -> ActivationCacheSpec:
    return ActivationCacheSpec.model_validate(
        {
            **CACHE_SPEC,
            "model": {"name": "tiny", "batchSize": batch_size},
            "storage": {**CACHE_SPEC["storage"], **storage},
            "run": {"resources": {"limits": limits or {}}},
        }
    )


def memory(*, weights: int = 100, forward: int = 80, shard: int = 50, shards: int = 3) -> WorkerMemory:
    return WorkerMemory(weights * MIB, forward * MIB, shard * MIB, shards)


def refusal(of: WorkerMemory, asked: ActivationCacheSpec) -> str:
    with pytest.raises(InvalidInput) as caught:
        of.check(asked)
    assert (caught.value.reason, caught.value.field) == ("NotEnoughMemory", "spec.run.resources.limits.memory")
    return caught.value.message


def test_it_is_the_sum_of_its_parts() -> None:
    of = memory()
    assert of.buffers == 150 * MIB
    assert of.total == PROCESS_BYTES + 330 * MIB


def test_the_plan_tells_every_part_on_a_line() -> None:
    assert memory().lines(gpu=False) == [
        "weights             100.0 MiB",
        "forward pass         80.0 MiB",
        "shard buffers       150.0 MiB: 3 of 50.0 MiB",
        "process           1,024.0 MiB",
    ]
    assert memory().lines(gpu=True)[0] == "weights             100.0 MiB (on the GPU)"


@pytest.mark.parametrize("limits", [None, {"memory": "330Mi"}, {"memory": "1Gi", "cpu": "2"}])
def test_what_fits_is_not_refused(limits: dict[str, str] | None) -> None:
    memory().check(spec(limits=limits))


def test_what_does_not_fit_tells_the_parts_and_each_field_that_mends_it() -> None:
    message = refusal(memory(), spec(limits={"memory": "300Mi"}))
    assert (
        "weights take 100.0 MiB, a forward pass 80.0 MiB, 3 shard buffers 150.0 MiB; the limit is 300.0 MiB" in message
    )
    assert message.endswith(
        f"raise it, or lower model.batchSize or storage.bufferBytes (two shards are {100 * MIB}) or storage.shardBytes"
    )


def test_only_fields_that_suffice_are_named() -> None:
    # 130 MiB too much: neither one context per batch nor two shards are enough.
    assert refusal(memory(), spec(limits={"memory": "200Mi"})).endswith("raise it, or lower storage.shardBytes")
    assert refusal(memory(shards=2), spec(limits={"memory": "270Mi"})).endswith(
        "or lower model.batchSize or storage.shardBytes"
    )
    assert refusal(memory(), spec(limits={"memory": "90Mi"})).endswith("the limit is 90.0 MiB: raise it")


@pytest.mark.parametrize("gpu", ["nvidia.com/gpu", "amd.com/gpu", "nvidia.com/mig-1g.10gb"])
def test_a_gpu_holds_weights_and_forward_pass(gpu: str) -> None:
    limits = {"memory": "150Mi", gpu: "1"}
    memory().check(spec(limits=limits))
    message = refusal(memory(shards=4), spec(limits=limits))
    assert "weights" not in message
    assert message.startswith(
        "4 shard buffers 200.0 MiB; the limit is 150.0 MiB: raise it, or lower storage.bufferBytes"
    )
