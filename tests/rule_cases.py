"""One case for each rule of the models: what breaks it, what keeps it, and what the user reads.

The unit tests put them to the models, the cluster tests to the API server: both must say the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from pydantic.alias_generators import to_camel

from sae_operator.api.resources import ACTIVATION_CACHE, SAE_SWEEP, SAE_TRAINING_JOB
from sae_operator.api.sae import FIELD_TYPES, type_names
from tests.specs import REMOVED, Edits, live_activations

CACHE = ACTIVATION_CACHE.kind
JOB = SAE_TRAINING_JOB.kind
SWEEP = SAE_SWEEP.kind


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
_HEURISTIC = {f"{_SAE}.initialization.decoder": "heuristic"}
_STANDARD = {"type": "standard", "l1Coefficient": 5}
_WEIGHTED = {**_STANDARD, "scaleSparsityPenaltyByDecoderNorm": True}
_TOPK = {"type": "topk", "k": 32}
_BATCHTOPK = {"type": "batchtopk", "k": 32}
_MATRYOSHKA = {"type": "matryoshka_batchtopk", "k": 32}
_GATED = {"type": "gated", "l1Coefficient": 5}
_JUMPRELU = {"type": "jumprelu", "l0Coefficient": 1}
_URI = {"activations": {"uri": "s3://saes/finished"}}
_NO_PARENTS = "uri must not contain '..' segments"
_NO_BUCKET = "must be s3://bucket/prefix; a bucket's name has 3 to 63 lower-case letters, digits, '.' and '-'"
_ONE_SOURCE = "exactly one of cacheRef, cache, uri and live must be set"
_NO_POSITION = "sampling.positions leaves no position of a context"
_HOOKS_UNIQUE = "hooks must be unique"
_VALUE_SOURCE = "exactly one of value and secretKeyRef must be set"
_SECRET_KEY = {"name": "hub", "key": "token"}


def _only_for(field: str, value: object, architecture: dict[str, object], other: dict[str, object]) -> RuleCase:
    """A field, by its Python name, of another type than the architecture's."""
    name = to_camel(field)
    return RuleCase(
        JOB,
        {_ARCHITECTURE: {**other, name: value}},
        f"{_AT_ARCHITECTURE}.{name}",
        f"{name} is only for {type_names(FIELD_TYPES[field])}",
        keeps={_ARCHITECTURE: {**architecture, name: value}},
    )


def _hook(source: str) -> str:
    return f"each SAE's hook must be one of activations.{source}.hooks; it may be left out only when there is one"


def _nothing_left(source: str) -> str:
    return f"evaluation.heldOutTokens must be less than activations.{source}.tokens, or nothing is left to train on"


def _no_positions(context_size: int, positions: Edits, keeps: Edits) -> RuleCase:
    return RuleCase(
        CACHE,
        {"contextSize": context_size, "sampling.positions": positions},
        "spec.sampling.positions",
        _NO_POSITION,
        {"contextSize": context_size, "sampling.positions": keeps},
    )


def _hook_cases(source: str, activations: Callable[[Edits], Edits]) -> list[RuleCase]:
    """Hooks of SAEs, with a source whose hooks are known; `activations` are edits of a job with that source."""
    two = {"hooks": [{"name": "a.0"}, {"name": "a.1"}]}
    head = {"hooks": [{"name": "z", "headIndex": 3}]}
    return [
        RuleCase(
            JOB,
            {**activations({}), f"{_SAE}.hook": "transformer.h.8"},
            "spec.saes",
            _hook(source),
            {**activations({}), f"{_SAE}.hook": "transformer.h.7"},
        ),
        RuleCase(JOB, activations(two), "spec.saes", _hook(source), {**activations(two), f"{_SAE}.hook": "a.1"}),
        RuleCase(
            JOB,
            {**activations(two), f"{_SAE}.hook": "a.1", f"{_SAE}.targetHook": "a.2"},
            "spec.saes",
            f"each transcoder's targetHook must be one of activations.{source}.hooks",
            {**activations(two), f"{_SAE}.hook": "a.1", f"{_SAE}.targetHook": "a.0"},
        ),
        *(
            RuleCase(
                JOB,
                {**activations(head), f"{_SAE}.hook": wrong},
                "spec.saes",
                _hook(source),
                {**activations(head), f"{_SAE}.hook": "z:3"},
            )
            for wrong in ("z", "z:30", "zz:3")
        ),
        RuleCase(
            JOB,
            {**activations({}), "evaluation.heldOutTokens": 1000},
            "spec.evaluation.heldOutTokens",
            _nothing_left(source),
            {**activations({}), "evaluation.heldOutTokens": 999},
        ),
    ]


def _node_requirement(**fields: object) -> Edits:
    terms = {"nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", **fields}]}]}
    return {"run.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution": terms}


_AT_REQUIREMENT = (
    "spec.run.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution"
    ".nodeSelectorTerms[0].matchExpressions[0].values"
)
_VALUES_OF = "values belong to operators In, NotIn, Gt and Lt, and to no other"
_CODE_OF_ENV = "a variable of this name could load code that the image does not hold; build an image instead"
_POD_CASES = [
    *(
        RuleCase(
            JOB,
            {"run.env": [{"name": name, "value": "x"}]},
            "spec.run.env[0].name",
            _CODE_OF_ENV,
            {"run.env": [{"name": f"MY_{name}", "value": "x"}]},
        )
        for name in ("LD_PRELOAD", "PYTHONPATH", "PATH", "OPENSSL_CONF", "TRITON_PTXAS_PATH", "CC")
    ),
    *(
        RuleCase(
            JOB, {"run.env": [{"name": name, "value": "x"}]}, "spec.run.env[0].name", _CODE_OF_ENV, {"run.env": [ok]}
        )
        for name, ok in (
            ("NCCL_NET_PLUGIN", {"name": "NCCL_DEBUG", "value": "INFO"}),
            ("CUDA_INJECTION64_PATH", {"name": "CUDA_VISIBLE_DEVICES", "value": "0"}),
            ("CUDA_COREDUMP_FILE", {"name": "CUDA_LAUNCH_BLOCKING", "value": "1"}),
            ("NCCL_CONF_FILE", {"name": "NCCL_TOPO_FILE", "value": "/data/topology.xml"}),
            ("AWS_CONFIG_FILE", {"name": "AWS_WEB_IDENTITY_TOKEN_FILE", "value": "/data/token"}),
            ("AWS_SHARED_CREDENTIALS_FILE", {"name": "AWS_CA_BUNDLE", "value": "/data/ca.pem"}),
            ("TORCH_ADDR2LINE_BINARY", {"name": "TORCH_SHOW_CPP_STACKTRACES", "value": "1"}),
            ("TORCHINDUCTOR_CUTLASS_DIR", {"name": "TORCHINDUCTOR_MAX_AUTOTUNE", "value": "1"}),
            ("FI_PROVIDER_PATH", {"name": "FI_PROVIDER", "value": "efa"}),
            ("UCX_MODULE_DIR", {"name": "UCX_TLS", "value": "tcp"}),
            ("OMP_TOOL_LIBRARIES", {"name": "OMP_PROC_BIND", "value": "true"}),
        )
    ),
    *(
        RuleCase(
            JOB,
            {"run.volumes": [{"claimName": "models", "mountPath": path}]},
            "spec.run.volumes[0].mountPath",
            "mountPath must lie outside the image's own folders, e.g. /data or /mnt/models",
            {"run.volumes": [{"claimName": "models", "mountPath": f"{path}-of-ours"}]},
        )
        for path in ("/etc", "/tmp")
    ),
    RuleCase(
        JOB,
        {"run.volumes": [{"claimName": "models", "mountPath": "/run/sae-job"}]},
        "spec.run.volumes[0].mountPath",
        "mountPath must lie outside the image's own folders, e.g. /data or /mnt/models",
        {"run.volumes": [{"claimName": "models", "mountPath": "/data/run"}]},
    ),
    RuleCase(
        JOB,
        {"run.volumes": [{"claimName": "a", "mountPath": "/data"}, {"claimName": "b", "mountPath": "/data"}]},
        "spec.run.volumes",
        "mountPath of volumes must be unique",
        {"run.volumes": [{"claimName": "a", "mountPath": "/data"}, {"claimName": "b", "mountPath": "/data2"}]},
    ),
    RuleCase(
        JOB,
        _node_requirement(operator="In"),
        _AT_REQUIREMENT,
        _VALUES_OF,
        _node_requirement(operator="In", values=["a100"]),
    ),
    RuleCase(
        JOB,
        _node_requirement(operator="Exists", values=["a100"]),
        _AT_REQUIREMENT,
        _VALUES_OF,
        _node_requirement(operator="Exists"),
    ),
    RuleCase(
        JOB,
        _node_requirement(operator="Gt", values=["1", "2"]),
        _AT_REQUIREMENT,
        "operators Gt and Lt compare with one value",
        _node_requirement(operator="Gt", values=["1"]),
    ),
]

_K = "saes[0].architecture.k"
_K_VALUES = {"path": _K, "values": [16, 32]}
_RATE = "training.learningRate"


def _space(breaks: Edits, field: str, message: str, keeps: Edits) -> RuleCase:
    return RuleCase(SWEEP, {"space": breaks}, field, message, {"space": keeps})


def _range(**fields: object) -> Edits:
    return {"method": "random", "count": 4, "parameters": [{"path": _RATE, "range": fields}]}


_SWEEP_CASES = [
    _space(
        _range(min=1, max=1),
        "spec.space.parameters[0].range.min",
        "min must be less than max",
        _range(min=1, max=2),
    ),
    _space(
        _range(min=0, max=1, scale="log"),
        "spec.space.parameters[0].range.min",
        "scale log needs a min above 0",
        _range(min=0, max=1),
    ),
    _space(
        {"parameters": [_K_VALUES], "trials": [{"values": [16]}]},
        "spec.space.trials",
        "trials belong to method list, which needs them",
        {"method": "list", "parameters": [{"path": _K}], "trials": [{"values": [16]}]},
    ),
    _space(
        {"method": "random", "parameters": [_K_VALUES]},
        "spec.space.count",
        "count belongs to method random, which needs it",
        {"method": "random", "count": 2, "parameters": [_K_VALUES]},
    ),
    _space(
        {"parameters": [_K_VALUES, _K_VALUES]},
        "spec.space.parameters",
        "paths of parameters must be unique",
        {"parameters": [_K_VALUES, {"path": _RATE, "values": [1]}]},
    ),
    RuleCase(
        SWEEP,
        {"template.suspend": True},
        "spec.template",
        "the template's suspend and retry are the sweep's; set spec.suspend and spec.retry instead",
        {"suspend": True, "retry": 3},
    ),
    RuleCase(
        SWEEP,
        {"medianStop": {"afterTokens": 10}, "template.medianStop": {"afterTokens": 10}},
        "spec.medianStop",
        "only one of medianStop and template.medianStop may be set",
        {"medianStop": {"afterTokens": 10}},
    ),
    RuleCase(
        SWEEP,
        {"objective.metric": "ce_loss_score"},
        "spec.objective.metric",
        "objective.metric must be one of template.evaluation.metrics",
        {"objective.metric": "ce_loss_score", "template.evaluation.metrics": ["ce_loss_score", "l0"]},
    ),
]

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
        _HOOKS_UNIQUE,
        {"hooks": [{"name": "a.0"}, {"name": "a.1"}]},
    ),
    RuleCase(
        CACHE,
        {"hooks": [{"name": "z", "headIndex": 0}, {"name": "z", "headIndex": 0}]},
        "spec.hooks",
        _HOOKS_UNIQUE,
        {"hooks": [{"name": "z"}, {"name": "z", "headIndex": 0}, {"name": "z", "headIndex": 1}]},
    ),
    RuleCase(
        JOB,
        {"activations": live_activations({"hooks": [{"name": "a"}, {"name": "a"}]}), f"{_SAE}.hook": "a"},
        "spec.activations.live.hooks",
        _HOOKS_UNIQUE,
        {"activations": live_activations({"hooks": [{"name": "a"}, {"name": "b"}]}), f"{_SAE}.hook": "a"},
    ),
    # Where model and text lie
    RuleCase(
        CACHE,
        {"model.store": {"region": "x"}},
        "spec.model.store",
        "store says how to reach an s3:// name; leave it out otherwise",
        {"model.store": {"region": "x"}, "model.name": "s3://models/small"},
    ),
    RuleCase(
        CACHE,
        {"dataset.store": {}},
        "spec.dataset.store",
        "store says how to reach an s3:// path; leave it out otherwise",
        {"dataset.store": {"secretRef": {"name": "s3"}}, "dataset.path": "s3://texts/english/"},
    ),
    RuleCase(
        CACHE,
        {"model.name": "s3://models/../small"},
        "spec.model.name",
        "name must not contain '..' segments",
        {"model.name": "../small"},
    ),
    RuleCase(
        CACHE,
        {"dataset.path": "s3://texts/.."},
        "spec.dataset.path",
        "path must not contain '..' segments",
        {"dataset.path": "s3://texts/..."},
    ),
    RuleCase(
        CACHE,
        {"model.name": "s3://Models/small"},
        "spec.model.name",
        f"name {_NO_BUCKET}",
        {"model.name": "s3://models"},
    ),
    RuleCase(CACHE, {"dataset.path": "s3://"}, "spec.dataset.path", f"path {_NO_BUCKET}", {"dataset.path": "s3:/a"}),
    RuleCase(
        CACHE,
        {"model.processing": {"foldLayerNorm": True}},
        "spec.model.processing",
        "processing is only for loader TransformerLens",
        {"model.processing": {"foldLayerNorm": True}, "model.loader": "TransformerLens"},
    ),
    # Positions, as Python slices a context
    _no_positions(8, {"start": 8}, {"start": 7}),
    _no_positions(8, {"start": 9, "stop": 20}, {"start": 7, "stop": 20}),
    _no_positions(8, {"stop": 0}, {"stop": 1}),
    _no_positions(8, {"stop": -8}, {"stop": -7}),
    _no_positions(8, {"start": 3, "stop": 3}, {"start": 3, "stop": 4, "step": 100}),
    _no_positions(8, {"start": -3, "stop": 5}, {"start": -3, "stop": 6}),
    _no_positions(8, {"start": -3, "stop": -3}, {"start": -3, "stop": -2}),
    _no_positions(8, {"start": -100, "stop": -9}, {"start": -100, "stop": -7}),
    RuleCase(
        JOB,
        {"activations": live_activations({"contextSize": 8, "sampling.positions": {"start": 8}})},
        "spec.activations.live.sampling.positions",
        _NO_POSITION,
        {"activations": live_activations({"contextSize": 9, "sampling.positions": {"start": 8}})},
    ),
    # Storage
    RuleCase(
        CACHE,
        {"storage.shardBytes": 4096, "storage.bufferBytes": 8191},
        "spec.storage.bufferBytes",
        "bufferBytes must be at least twice shardBytes: one shard is filled while another is stored",
        {"storage.shardBytes": 4096, "storage.bufferBytes": 8192},
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
        {"activations": {"uri": "s3://saes/finished", **live_activations()}},
        "spec.activations",
        _ONE_SOURCE,
        {"activations": live_activations()},
    ),
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
    *(
        RuleCase(
            JOB,
            {_ARCHITECTURE: {"type": kind}},
            f"{_AT_ARCHITECTURE}.{name}",
            f"{name} is required for {type_names(FIELD_TYPES[field])}",
            {_ARCHITECTURE: {"type": kind, name: 5}},
        )
        for kind, field, name in (
            ("topk", "k", "k"),
            ("batchtopk", "k", "k"),
            ("standard", "l1_coefficient", "l1Coefficient"),
            ("gated", "l1_coefficient", "l1Coefficient"),
            ("jumprelu", "l0_coefficient", "l0Coefficient"),
        )
    ),
    _only_for("k", 32, _TOPK, _STANDARD),
    _only_for("aux_k_coefficient", 0.03125, _TOPK, _STANDARD),
    _only_for("aux_k", 64, _TOPK, _STANDARD),
    _only_for("aux_k_form", "saelens", _BATCHTOPK, _JUMPRELU),
    _only_for("threshold_momentum", 0.9, _BATCHTOPK, _TOPK),
    _only_for("widths", [16, 64], _MATRYOSHKA, _BATCHTOPK),
    _only_for("l1_coefficient", 5, _STANDARD, _TOPK),
    _only_for("l1_warm_up_steps", 0, _GATED, _TOPK),
    _only_for("lp_norm", 1, _STANDARD, _GATED),
    _only_for("scale_sparsity_penalty_by_decoder_norm", False, _STANDARD, _GATED),
    _only_for("activation", "tanh-relu", _STANDARD, _JUMPRELU),
    _only_for("ghost_gradients", True, _STANDARD, _GATED),
    _only_for("l0_coefficient", 1, _JUMPRELU, _STANDARD),
    _only_for("l0_warm_up_steps", 9, _JUMPRELU, _STANDARD),
    _only_for("sparsity_penalty", "step", _JUMPRELU, _STANDARD),
    _only_for("bandwidth", 0.01, _JUMPRELU, _STANDARD),
    _only_for("initial_threshold", 0.01, _JUMPRELU, _TOPK),
    _only_for("pre_activation_coefficient", 0.01, _JUMPRELU, _TOPK),
    _only_for("noise_scale", 0.01, _STANDARD, _GATED),
    RuleCase(
        JOB,
        {_ARCHITECTURE: {**_TOPK, "sparsityPenalty": "target_l0", "targetL0": 9}},
        f"{_AT_ARCHITECTURE}.targetL0",
        f"targetL0 is only for {type_names(FIELD_TYPES['target_l0'])}",
        {_ARCHITECTURE: {**_JUMPRELU, "sparsityPenalty": "target_l0", "targetL0": 9}},
    ),
    RuleCase(
        JOB,
        {_ARCHITECTURE: {**_TOPK, "sparsityPenalty": "tanh", "tanhScale": 4}},
        f"{_AT_ARCHITECTURE}.tanhScale",
        f"tanhScale is only for {type_names(FIELD_TYPES['tanh_scale'])}",
        {_ARCHITECTURE: {**_JUMPRELU, "sparsityPenalty": "tanh", "tanhScale": 4}},
    ),
    RuleCase(
        JOB,
        {_ARCHITECTURE: {**_JUMPRELU, "targetL0": 9}},
        f"{_AT_ARCHITECTURE}.targetL0",
        "targetL0 goes with sparsityPenalty target_l0",
        {_ARCHITECTURE: {**_JUMPRELU, "targetL0": 9, "sparsityPenalty": "target_l0"}},
    ),
    RuleCase(
        JOB,
        {_ARCHITECTURE: {**_JUMPRELU, "tanhScale": 4, "sparsityPenalty": "step"}},
        f"{_AT_ARCHITECTURE}.tanhScale",
        "tanhScale goes with sparsityPenalty tanh",
        {_ARCHITECTURE: {**_JUMPRELU, "tanhScale": 4, "sparsityPenalty": "tanh"}},
    ),
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
        _HEURISTIC,
        "spec.saes[0].normalizeDecoder",
        "initialization.decoder heuristic needs normalizeDecoder: false",
        {**_HEURISTIC, f"{_SAE}.normalizeDecoder": False},
    ),
    RuleCase(
        JOB,
        {_ARCHITECTURE: _WEIGHTED, f"{_SAE}.normalizeDecoder": True},
        "spec.saes[0].normalizeDecoder",
        "scaleSparsityPenaltyByDecoderNorm needs normalizeDecoder: false",
        {_ARCHITECTURE: _WEIGHTED},
    ),
    RuleCase(
        JOB,
        {**_HEURISTIC, _ARCHITECTURE: {**_STANDARD, "scaleSparsityPenaltyByDecoderNorm": False}},
        "spec.saes[0].normalizeDecoder",
        "initialization.decoder heuristic needs normalizeDecoder: false",
        {**_HEURISTIC, _ARCHITECTURE: _STANDARD},
    ),
    RuleCase(
        JOB,
        {"saes": [{"name": "a", "architecture": _TOPK}, {"name": "a", "architecture": _STANDARD}]},
        "spec.saes",
        "names of saes must be unique",
        {"saes": [{"name": "a", "architecture": _TOPK}, {"name": "b", "architecture": _STANDARD}]},
    ),
    RuleCase(
        JOB,
        {f"{_SAE}.skipConnection": True},
        "spec.saes[0].skipConnection",
        "skipConnection is only for a transcoder; set targetHook",
        {f"{_SAE}.skipConnection": True, f"{_SAE}.targetHook": "transformer.h.7"},
    ),
    RuleCase(
        JOB,
        {f"{_SAE}.applyBDecToInput": True, f"{_SAE}.targetHook": "transformer.h.7"},
        "spec.saes[0].applyBDecToInput",
        "applyBDecToInput cannot be true for a transcoder: b_dec is of its outputs",
        {f"{_SAE}.applyBDecToInput": False, f"{_SAE}.targetHook": "transformer.h.7"},
    ),
    RuleCase(
        JOB,
        {f"{_SAE}.stopEarly": {"afterTokens": 10}},
        "spec.saes[0].stopEarly",
        "stopEarly needs at least one of explainedVarianceBelow, l0Above, l0Below and deadFractionAbove",
        {f"{_SAE}.stopEarly": {"afterTokens": 10, "l0Above": 100}},
    ),
    *_hook_cases("cache", lambda edits: {f"activations.cache.{field}": value for field, value in edits.items()}),
    *_hook_cases("live", lambda edits: {"activations": live_activations(edits)}),
    # Training
    RuleCase(
        JOB,
        {"checkpoints": {"everyTokens": 10, "everySeconds": 10}},
        "spec.checkpoints",
        "only one of everyTokens and everySeconds may be set",
        {"checkpoints": {"everySeconds": 10}},
    ),
    RuleCase(
        JOB,
        {"medianStop": {"afterTokens": 10, "uri": "s3://saes/a/../b"}},
        "spec.medianStop.uri",
        _NO_PARENTS,
        {"medianStop": {"afterTokens": 10, "uri": "s3://saes/a/b..c"}},
    ),
    *_POD_CASES,
    *_SWEEP_CASES,
]
