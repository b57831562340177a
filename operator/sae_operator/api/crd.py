"""The CustomResourceDefinitions: `python -m sae_operator.api.crd --out manifests/crds [--check]`."""

from __future__ import annotations

import io
import sys
from typing import Any

from ruamel.yaml import YAML

from sae_operator.api.base import (
    DNS_LABEL_PATTERN,
    GROUP,
    MAX_NAME_LENGTH,
    NAME_LABEL_MESSAGE,
    NAME_LENGTH_MESSAGE,
    VERSION,
)
from sae_operator.api.generated import write_or_check
from sae_operator.api.resources import ACTIVATION_CACHE, KINDS, SAE_SWEEP, SAE_TRAINING_JOB, Kind
from sae_operator.api.schema import structural_schema

# A new resource shows -1 until the operator has seen it, so that kstatus never takes it for current.
UNSEEN_GENERATION = -1

_HEADER = "# Generated from the models of sae_operator.api by `make generate`; do not edit.\n"
_AGE = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}


def _column(name: str, json_path: str, kind: str = "string", **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "jsonPath": json_path, **more}


_PHASE = _column("Phase", ".status.phase", description="Where it stands.")
_PROGRESS = _column("Progress%", ".status.progress.percent", "integer", description="Share of the current step done.")
PRINTER_COLUMNS: dict[str, list[dict[str, Any]]] = {
    ACTIVATION_CACHE.kind: [
        _PHASE,
        _PROGRESS,
        _column("Tokens", ".status.tokens", "integer", description="Rows of the finished cache."),
        _column("Bytes", ".status.bytes", "integer", description="Bytes of the finished cache."),
        _AGE,
    ],
    SAE_TRAINING_JOB.kind: [
        _PHASE,
        _PROGRESS,
        _column("Tokens/s", ".status.progress.tokensPerSecond", "integer", description="Current rate."),
        _column("EV", ".status.summary.explainedVariance", description="Explained variance of the best SAE."),
        _column("L0", ".status.summary.l0", description="Mean active latents per token of the best SAE."),
        _column("Output", ".spec.output.uri", priority=1, description="Where results go."),
        _AGE,
    ],
    SAE_SWEEP.kind: [
        _PHASE,
        _column("Finished", ".status.summary.finished", description="Finished trials of all."),
        _column("Failed", ".status.trials.failed", "integer", description="Trials that failed."),
        _column("Best", ".status.summary.trial", description="The best trial so far."),
        _column("Objective", ".status.summary.objective", description="Its figure of the objective's metric."),
        _column("L0", ".status.summary.l0", description="Its mean active latents per token."),
        _column("Output", ".spec.template.output.uri", priority=1, description="Where results go."),
        _AGE,
    ],
}
_DESCRIPTIONS = {
    ACTIVATION_CACHE.kind: "Activations of a language model on a dataset, computed once and kept in an object store.",
    SAE_TRAINING_JOB.kind: "One or more sparse autoencoders trained from one stream of activations.",
    SAE_SWEEP.kind: "Training jobs over a space of settings, which share caches, and a report that compares them.",
}


def custom_resource_definition(kind: Kind) -> dict[str, Any]:
    """The CRD of a kind, as a manifest."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind.kind,
                "listKind": f"{kind.kind}List",
                "plural": kind.plural,
                "singular": kind.singular,
                "shortNames": list(kind.short_names),
                "categories": ["sae"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": PRINTER_COLUMNS[kind.kind],
                    "subresources": {"status": {}},
                    "schema": {"openAPIV3Schema": _root_schema(kind)},
                }
            ],
        },
    }


def _root_schema(kind: Kind) -> dict[str, Any]:
    spec = {**structural_schema(kind.spec), "description": "What is wanted."}
    status = {
        "description": "What the operator last saw and did.",
        **{key: value for key, value in structural_schema(kind.status).items() if key != "description"},
        "default": {"observedGeneration": UNSEEN_GENERATION},
    }
    if kind is ACTIVATION_CACHE:
        # Owners of an inline cache apply it as managers of their own: one who runs it again with other settings must
        # get rid of those that another has applied, too.
        spec["properties"]["run"] |= {"x-kubernetes-map-type": "atomic"}
    status["properties"]["observedGeneration"]["default"] = UNSEEN_GENERATION
    status["properties"]["conditions"] |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    return {
        "description": _DESCRIPTIONS[kind.kind],
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "maxLength": 64, "description": f"`{GROUP}/{VERSION}`."},
            "kind": {"type": "string", "maxLength": 64, "description": f"`{kind.kind}`."},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
        "x-kubernetes-validations": [
            {"rule": f"self.metadata.name.size() <= {MAX_NAME_LENGTH}", "message": NAME_LENGTH_MESSAGE},
            {"rule": f"self.metadata.name.matches('{DNS_LABEL_PATTERN}')", "message": NAME_LABEL_MESSAGE},
        ],
    }


def generated_files() -> dict[str, str]:
    """File name -> YAML text, one file per kind."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.width = 120
    files = {}
    for kind in KINDS.values():
        stream = io.StringIO()
        yaml.dump(custom_resource_definition(kind), stream)
        files[f"{kind.plural}.yaml"] = _HEADER + stream.getvalue()
    return files


if __name__ == "__main__":
    sys.exit(write_or_check(generated_files(), sys.argv[1:], program="python -m sae_operator.api.crd"))
