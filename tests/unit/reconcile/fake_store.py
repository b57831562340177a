"""What steps that have worked leave in an object store in memory, and what they say of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sae_operator.api.steps import CacheStep, TrainStep

ROWS_PER_SHARD = 100


@dataclass(kw_only=True)
class FakeStore:
    """Attributes:
    stored_rows: rows of each finished cache by location.
    stored_hooks: hooks of each finished cache by location.
    prepared_contexts: locations of live sources whose contexts are there.
    finished_outputs: tokens of each finished training by location.
    """

    stored_rows: dict[str, int] = field(default_factory=dict)
    stored_hooks: dict[str, set[str]] = field(default_factory=dict)
    prepared_contexts: set[str] = field(default_factory=set)
    finished_outputs: dict[str, int] = field(default_factory=dict)

    def step_result(self, given: CacheStep | TrainStep) -> dict[str, Any]:
        """The result of a step, by what it was given and what the store holds."""
        result: dict[str, Any] = {"step": given.step, "exitCode": 0, "reason": "Completed"}
        return result | (self._train(given) if isinstance(given, TrainStep) else self._cache(given))

    def _train(self, given: TrainStep) -> dict[str, Any]:
        source = given.spec.activations.cache or given.spec.activations.live
        output = given.spec.output.uri
        tokens = given.spec.training.tokens or (source.tokens if source is not None else 1000)
        figures = [
            {"name": sae.name, "phase": "Succeeded", "explainedVariance": 0.8 + i / 100, "l0": 32.04, "mse": 1.5}
            for i, sae in enumerate(given.spec.saes)
        ]
        if given.step == "preflight":
            if self.finished_outputs.get(output, 0) >= tokens:
                return {"adopted": True, "saes": figures, "tokens": tokens}
            if given.spec.activations.live is not None:
                self.prepared_contexts.add(given.activations.uri)
            return {"plan": {"memoryBytes": 2**30, "gpuSeconds": 12.4}}
        self._check_activations(given)
        self.finished_outputs[output] = tokens
        return {"saes": figures, "tokens": tokens, "tokensPerSecond": 1234.5}

    def _cache(self, given: CacheStep) -> dict[str, Any]:
        place, asked = given.location.uri, given.spec.tokens
        rows = self.stored_rows.get(place, 0)
        hooks = {hook.key for hook in given.spec.hooks}
        if not hooks <= self.stored_hooks.get(place, set()):
            rows = 0
        shards = {"shardsTotal": -(-asked // ROWS_PER_SHARD), "shardsComplete": rows // ROWS_PER_SHARD}
        facts = {"hooks": [{"name": hook.key, "dIn": 8, "meanNorm": 3.0} for hook in given.spec.hooks]}
        if given.step == "prepare":
            adopted = rows >= asked
            plan = {"bytes": 16 * asked, "memoryBytes": 2**30, "gpuSeconds": None}
            facts = facts | {"tokens": rows, "bytes": 16 * rows} if adopted else {}
            return shards | facts | {"plan": plan, "adopted": adopted}
        if given.step == "finalize":
            self.stored_rows[place] = asked
            self.stored_hooks[place] = self.stored_hooks.get(place, set()) | hooks
            return shards | facts | {"tokens": asked, "bytes": 16 * asked, "shardsComplete": shards["shardsTotal"]}
        return {}

    def _check_activations(self, given: TrainStep) -> None:
        """What the training reads is there."""
        place, activations = given.activations.uri, given.spec.activations
        if activations.live is not None:
            assert place in self.prepared_contexts
        elif not activations.uri:
            assert self.stored_rows[place] > 0
            assert {sae.hook for sae in given.spec.saes if sae.hook} <= self.stored_hooks[place]
