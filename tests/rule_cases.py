"""One case for each rule of the models: what breaks it, what keeps it, and what the user reads.

The unit tests put them to the models, the cluster tests to the API server: both must say the same.
"""

from __future__ import annotations

import dataclasses

from sae_operator.api.resources import ACTIVATION_CACHE, SAE_TRAINING_JOB
from tests.specs import REMOVED, Edits

CACHE = ACTIVATION_CACHE.kind
JOB = SAE_TRAINING_JOB.kind


@dataclasses.dataclass(frozen=True)
class RuleCase:
    """A rule of a kind's spec.

    Attributes:
        kind: kind whose spec is edited.
        breaks: edits of the valid spec that break the rule, and it alone.
        field: path that the message names.
        message: what the user reads.
        keeps: edits, as near as possible to `breaks`, that are valid.
    """

    kind: str
    breaks: Edits
    field: str
    message: str
    keeps: Edits = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind}-{'-'.join(self.breaks)}"


_SAE = "saes.0"
_ARCHITECTURE = "saes.0.architecture"
_AT_ARCHITECTURE = "spec.saes[0].architecture"
_STANDARD = {"type": "standard", "l1Coefficient": 5}
_TOPK = {"type": "topk", "k": 32}
_URI = {"activations": {"uri": "s3://saes/finished"}}
_NO_PARENTS = "uri must not contain '..' segments"
_ONE_SOURCE = "exactly one of cacheRef, cache and uri must be set"
_HOOK = "each SAE's hook must be one of activations.cache.hooks; it may be left out only when there is one"
_VALUE_SOURCE = "exactly one of value and secretKeyRef must be set"
_SECRET_KEY = {"name": "hub", "key": "token"}


def _only_for(name: str, value: object, architecture: dict[str, object], other: dict[str, object]) -> RuleCase:
    return RuleCase(
        JOB,
        {_ARCHITECTURE: {**other, name: value}},
        f"{_AT_ARCHITECTURE}.{name}",
        f"{name} is only for type {architecture['type']}",
        keeps={_ARCHITECTURE: {**architecture, name: value}},
    )


RULE_CASES = [
    # Where data lies
    RuleCase(CACHE, {"storage.uri": "s3://saes/../other"}, "spec.storage.uri", _NO_PARENTS),
    RuleCase(
        JOB, {"output.uri": "file:///data/.."}, "spec.output.uri", _NO_PARENTS, {"output.uri": "file:///data/.x.."}
    ),
    RuleCase(JOB, {"activations": {"uri": "s3://saes/a/.."}}, "spec.activations.uri", _NO_PARENTS, _URI),
    # Hooks of a cache
    RuleCase(
        CACHE,
        {"hooks": [{"name": "a.0"}, {"name": "a.1"}, {"name": "a.0"}]},
        "spec.hooks",
        "names of hooks must be unique",
        {"hooks": [{"name": "a.0"}, {"name": "a.1"}]},
    ),
    # Pods
    RuleCase(
        CACHE, {"run.env": [{"name": "A"}]}, "spec.run.env[0]", _VALUE_SOURCE, {"run.env": [{"name": "A", "value": ""}]}
    ),
    RuleCase(
        CACHE,
        {"run.env": [{"name": "A", "value": "x", "secretKeyRef": _SECRET_KEY}]},
        "spec.run.env[0]",
        _VALUE_SOURCE,
        {"run.env": [{"name": "A", "secretKeyRef": _SECRET_KEY}]},
    ),
    RuleCase(
        JOB,
        {"run.env": [{"name": "SAE_JOB_POD_IP", "value": "x"}]},
        "spec.run.env[0].name",
        "names that begin with SAE_JOB_ are set by the operator",
        {"run.env": [{"name": "SAE_JOBS", "value": "x"}]},
    ),
    RuleCase(
        CACHE,
        {"run.tolerations": [{"key": "gpu", "operator": "Exists", "value": "yes"}]},
        "spec.run.tolerations[0].value",
        "value is only for operator Equal",
        {"run.tolerations": [{"key": "gpu", "operator": "Exists"}, {"key": "gpu", "value": "yes"}]},
    ),
    RuleCase(
        CACHE,
        {"run.tolerations": [{"value": "yes"}]},
        "spec.run.tolerations[0].key",
        "key may be left out only with operator Exists",
        {"run.tolerations": [{"operator": "Exists"}]},
    ),
    RuleCase(
        JOB,
        {"run.cpuSteps.tolerations": [{"key": "a", "tolerationSeconds": 5}]},
        "spec.run.cpuSteps.tolerations[0].tolerationSeconds",
        "tolerationSeconds is only for effect NoExecute",
        {"run.cpuSteps.tolerations": [{"key": "a", "tolerationSeconds": 5, "effect": "NoExecute"}]},
    ),
    # Where activations come from
    RuleCase(JOB, {"activations": {}}, "spec.activations", _ONE_SOURCE, {"activations": {"cacheRef": {"name": "c"}}}),
    RuleCase(JOB, {"activations.cacheRef": {"name": "c"}}, "spec.activations", _ONE_SOURCE),
    RuleCase(
        JOB,
        {"activations.secretRef": {"name": "s3"}},
        "spec.activations",
        "endpointUrl, region and secretRef belong to uri; a cache has its own under storage",
        {"activations": {"uri": "s3://saes/finished", "secretRef": {"name": "s3"}, "region": "eu-west-1"}},
    ),
    RuleCase(
        JOB,
        {"activations.cache.retry": 1},
        "spec.activations.cache",
        "an inline cache follows the suspend and retry of its job; set spec.suspend and spec.retry instead",
        {"activations.cache.retry": 0, "activations.cache.suspend": False, "retry": 1, "suspend": True},
    ),
    # Architectures
    RuleCase(JOB, {_ARCHITECTURE: {"type": "topk"}}, f"{_AT_ARCHITECTURE}.k", "k is required for type topk"),
    _only_for("k", 32, _TOPK, _STANDARD),
    _only_for("auxKCoefficient", 0.03125, _TOPK, _STANDARD),
    _only_for("auxK", 64, _TOPK, _STANDARD),
    RuleCase(
        JOB,
        {_ARCHITECTURE: {"type": "standard"}},
        f"{_AT_ARCHITECTURE}.l1Coefficient",
        "l1Coefficient is required for type standard",
        {_ARCHITECTURE: _STANDARD},
    ),
    _only_for("l1Coefficient", 5, _STANDARD, _TOPK),
    _only_for("l1WarmUpSteps", 0, _STANDARD, _TOPK),
    _only_for("lpNorm", 1, _STANDARD, _TOPK),
    _only_for("scaleSparsityPenaltyByDecoderNorm", False, _STANDARD, _TOPK),
    # SAEs
    RuleCase(
        JOB,
        {f"{_SAE}.name": "checkpoints"},
        "spec.saes[0].name",
        "the folder checkpoints below output.uri is taken; choose another name",
        {f"{_SAE}.name": "checkpoint"},
    ),
    RuleCase(
        JOB,
        {f"{_SAE}.expansionFactor": 8},
        "spec.saes[0]",
        "only one of dSae and expansionFactor may be set",
        {f"{_SAE}.expansionFactor": 8, f"{_SAE}.dSae": REMOVED},
    ),
    RuleCase(JOB, {f"{_SAE}.dSae": 31}, f"{_AT_ARCHITECTURE}.k", "k must be at most dSae", {f"{_SAE}.dSae": 32}),
    RuleCase(
        JOB,
        {f"{_SAE}.initialization.decoder": "heuristic"},
        "spec.saes[0].normalizeDecoder",
        "initialization.decoder heuristic needs normalizeDecoder: false",
        {f"{_SAE}.initialization.decoder": "heuristic", f"{_SAE}.normalizeDecoder": False},
    ),
    RuleCase(
        JOB,
        {_ARCHITECTURE: {**_STANDARD, "scaleSparsityPenaltyByDecoderNorm": True}},
        "spec.saes[0].normalizeDecoder",
        "scaleSparsityPenaltyByDecoderNorm needs normalizeDecoder: false",
        {
            _ARCHITECTURE: {**_STANDARD, "scaleSparsityPenaltyByDecoderNorm": True},
            f"{_SAE}.normalizeDecoder": False,
        },
    ),
    RuleCase(
        JOB,
        {"saes": [{"name": "a", "architecture": _TOPK}, {"name": "a", "architecture": _STANDARD}]},
        "spec.saes",
        "names of saes must be unique",
        {"saes": [{"name": "a", "architecture": _TOPK}, {"name": "b", "architecture": _STANDARD}]},
    ),
    RuleCase(JOB, {f"{_SAE}.hook": "transformer.h.8"}, "spec.saes", _HOOK, {f"{_SAE}.hook": "transformer.h.7"}),
    RuleCase(
        JOB,
        {"activations.cache.hooks": [{"name": "a.0"}, {"name": "a.1"}]},
        "spec.saes",
        _HOOK,
        {"activations.cache.hooks": [{"name": "a.0"}, {"name": "a.1"}], f"{_SAE}.hook": "a.1"},
    ),
    # Training
    RuleCase(
        JOB,
        {"evaluation.heldOutTokens": 1000},
        "spec.evaluation.heldOutTokens",
        "evaluation.heldOutTokens must be less than activations.cache.tokens, or nothing is left to train on",
        {"evaluation.heldOutTokens": 999},
    ),
    RuleCase(
        JOB,
        {"checkpoints": {"everyTokens": 10, "everySeconds": 10}},
        "spec.checkpoints",
        "only one of everyTokens and everySeconds may be set",
        {"checkpoints": {"everySeconds": 10}},
    ),
]
