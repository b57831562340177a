"""What the example tells kustomize of our kinds, against the kinds themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "gitops" / "examples" / "experiments" / "base" / "kustomize-kinds.yaml"
# Last parts of the paths of fields, by what they name.
SECRETS = (("secretRef", "name"), ("secretKeyRef", "name"), ("imagePullSecrets", "name"))
CACHES, IMAGES = (("cacheRef", "name"),), (("image",),)


def fields(schema: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all fields, as kustomize takes them."""
    for name, inner in schema.get("properties", {}).items():
        yield (*path, name)
        yield from fields(inner, (*path, name))
    # Of a list, paths lead on as those of its items.
    if "items" in schema:
        yield from fields(schema["items"], path)


def of_kinds(endings: tuple[tuple[str, ...], ...]) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for file in (ROOT / "manifests" / "crds").glob("*.yaml"):
        crd = yaml.safe_load(file.read_text())
        spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
        named = (path for path in fields(spec, ("spec",)) if any(path[-len(end) :] == end for end in endings))
        found |= {(crd["spec"]["names"]["kind"], "/".join(path)) for path in named}
    return found


@pytest.mark.parametrize(("what", "endings"), [("Secret", SECRETS), ("ActivationCache", CACHES), ("images", IMAGES)])
def test_each_field_that_names_one_is_told(what: str, endings: tuple[tuple[str, ...], ...]) -> None:
    told = yaml.safe_load(EXAMPLE.read_text())
    named = {entry["kind"]: entry["fieldSpecs"] for entry in told["nameReference"]} | {"images": told["images"]}
    specs = [(spec["kind"], spec["path"]) for spec in named[what]]
    assert len(specs) == len(set(specs))
    assert set(specs) == of_kinds(endings)
