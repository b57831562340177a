"""Memory that steps need, and the limits of their pods."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sae_job.activations.writer import shards_in_memory
from sae_job.errors import InvalidInput
from sae_job.models.facts import ModelFacts, forward_bytes
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.run_settings import RunSettings
from sae_operator.api.training_job import SAETrainingJobSpec

logger = logging.getLogger(__name__)

# Interpreter and libraries.
PROCESS_BYTES = 2**30
# Suffixes of a Kubernetes quantity, from 10**-9 and from 2**10 on.
_DECIMAL_SUFFIXES = ("n", "u", "m", "", "k", "M", "G", "T", "P", "E")
_BINARY_SUFFIXES = ("Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def quantity_bytes(quantity: int | str) -> int:
    """A Kubernetes quantity of memory in bytes: `1536Mi`, `2G`, `1e9`, `4096`."""
    text = str(quantity)
    number = text.rstrip("numkKMGTPEi")
    suffix = text[len(number) :]
    if suffix in _BINARY_SUFFIXES:
        return int(float(number) * 2 ** (10 * (_BINARY_SUFFIXES.index(suffix) + 1)))
    return int(float(number) * 10.0 ** (3 * (_DECIMAL_SUFFIXES.index(suffix) - 3)))


def memory_limit(run: RunSettings) -> int | None:
    """Bytes that a pod may take; None without a limit."""
    limits = run.resources.limits
    return quantity_bytes(limits["memory"]) if "memory" in limits else None


def has_gpu(run: RunSettings) -> bool:
    """Whether a pod gets a GPU, which then holds what a model needs."""
    # A part of one (MIG) has a name such as nvidia.com/mig-1g.10gb.
    return any("gpu" in name or "/mig-" in name for name in run.resources.limits)


def training_processes(spec: SAETrainingJobSpec) -> int:
    """Processes that share every batch of a job: one for each whole GPU of each pod, and at least one in each."""
    limits = spec.run.resources.limits
    gpus = sum(quantity_bytes(count) for name, count in limits.items() if name.endswith("/gpu"))
    return spec.parallelism * max(1, gpus)


@dataclass(frozen=True)
class WorkerMemory:
    """What a cache worker needs, in bytes.

    Attributes:
        weights: of the layers up to the last hook.
        forward: one forward pass.
        shard: all parts of a shard that are written together.
        shards: shards held at a time.
    """

    weights: int
    forward: int
    shard: int
    shards: int

    @classmethod
    def of(cls, spec: ActivationCacheSpec, facts: ModelFacts, shard_bytes: int) -> WorkerMemory:
        """Of a cache whose workers write so many bytes for a full shard."""
        return cls(
            weights=facts.parameter_bytes,
            forward=forward_bytes(facts, spec.model, spec.context_size),
            shard=shard_bytes,
            shards=shards_in_memory(spec.storage.buffer_bytes, shard_bytes),
        )

    @property
    def buffers(self) -> int:
        return self.shard * self.shards

    @property
    def total(self) -> int:
        return PROCESS_BYTES + self.weights + self.forward + self.buffers

    def lines(self, *, gpu: bool) -> list[str]:
        """One line for each of these, for people."""
        place = " (on the GPU)" if gpu else ""
        return [
            f"weights        {mebibytes(self.weights)}{place}",
            f"forward pass   {mebibytes(self.forward)}{place}",
            f"shard buffers  {mebibytes(self.buffers)}: {self.shards} of {mebibytes(self.shard).strip()}",
            f"process        {mebibytes(PROCESS_BYTES)}",
        ]

    def check(self, spec: ActivationCacheSpec) -> None:
        """Raises InvalidInput when a worker's pod cannot hold this: without a GPU weights, a forward pass and buffers;
        with one the buffers."""
        limit = memory_limit(spec.run)
        gpu = has_gpu(spec.run)
        needed = self.buffers if gpu else self.weights + self.forward + self.buffers
        if limit is None or needed <= limit:
            return
        model = (
            ""
            if gpu
            else (f"weights take {mebibytes(self.weights).strip()}, a forward pass {mebibytes(self.forward).strip()}, ")
        )
        raise InvalidInput(
            "NotEnoughMemory",
            f"{model}{self.shards} shard buffers {mebibytes(self.buffers).strip()}; the limit is "
            f"{mebibytes(limit).strip()}: raise it{self._what_to_lower(spec, needed - limit, gpu=gpu)}",
            field="spec.run.resources.limits.memory",
        )

    def _what_to_lower(self, spec: ActivationCacheSpec, excess: int, *, gpu: bool) -> str:
        """Each field that mends an excess when it alone is lowered."""
        fields = []
        if not gpu and self.forward - self.forward // spec.model.batch_size >= excess:
            fields.append("model.batchSize")
        # The API asks for room for two shards.
        if self.shards > 2 and (self.shards - 2) * self.shard >= excess:
            fields.append(f"storage.bufferBytes (two shards are {2 * self.shard})")
        if self.buffers > excess:
            fields.append("storage.shardBytes")
        return f", or lower {' or '.join(fields)}" if fields else ""


def mebibytes(size: int) -> str:
    """Of a table's width."""
    return f"{size / 2**20:10,.1f} MiB"
