"""What the steps' pods leave: finished caches and outputs in an object store, and their termination messages."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from tests.chaos.api_server import Object

ROWS_PER_SHARD = 100


@dataclass
class ObjectStore:
    """Attributes:
    rows, hooks: of each finished cache, by location.
    outputs: tokens that each output was trained on.
    """

    rows: dict[str, int] = field(default_factory=dict)
    hooks: dict[str, set[str]] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)

    def finish(self, step: str, config_map: Object) -> str:
        """A step's pod has done its work; its termination message."""
        given = json.loads(config_map["data"]["step.json"])
        told: Object = {"step": step, "exitCode": 0, "reason": "Completed"}
        if step in ("prepare", "cache", "finalize"):
            return json.dumps(told | self._cache(step, given))
        if step in ("preflight", "train"):
            return json.dumps(told | self._training(step, given))
        return json.dumps(told)

    def _cache(self, step: str, given: Object) -> Object:
        place, asked = given["location"]["uri"], given["spec"]["tokens"]
        names = [hook["name"] for hook in given["spec"]["hooks"]]
        there = self.rows.get(place, 0) if set(names) <= self.hooks.get(place, set()) else 0
        total = -(-asked // ROWS_PER_SHARD)
        facts = {"hooks": [{"name": name, "dIn": 8, "meanNorm": 3.0} for name in names]}
        if step == "prepare":
            adopted = there >= asked
            plan = {"bytes": 16 * asked, "memoryBytes": 2**30}
            shards = {"shardsTotal": total, "shardsComplete": there // ROWS_PER_SHARD}
            return shards | {"plan": plan, "adopted": adopted} | (facts | {"tokens": there} if adopted else {})
        if step == "cache":
            return {"shardsComplete": total}
        self.rows[place] = max(asked, there)
        self.hooks[place] = self.hooks.get(place, set()) | set(names)
        return facts | {"shardsTotal": total, "shardsComplete": total, "tokens": asked, "bytes": 16 * asked}

    def _training(self, step: str, given: Object) -> Object:
        spec, output = given["spec"], given["spec"]["output"]["uri"]
        source = spec["activations"].get("cache") or spec["activations"].get("live") or {}
        tokens = (spec.get("training") or {}).get("tokens") or source.get("tokens") or 1000
        figures = [
            {"name": sae["name"], "phase": "Succeeded", "explainedVariance": 0.8, "l0": 32.0, "mse": 1.5}
            for sae in spec["saes"]
        ]
        if step == "preflight":
            if self.outputs.get(output, 0) >= tokens:
                return {"adopted": True, "saes": figures, "tokens": tokens}
            return {"plan": {"memoryBytes": 2**30, "gpuSeconds": 12.4}}
        if "cache" in spec["activations"] or "cacheRef" in spec["activations"]:
            assert self.rows.get(given["activations"]["uri"], 0) > 0, "trains on a cache that is not there"
        self.outputs[output] = tokens
        return {"saes": figures, "tokens": tokens, "tokensPerSecond": 1234.5}
