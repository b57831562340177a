"""`sae-job convert`: a training configuration of SAELens as a manifest."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sae_job.commands.saelens_config import Conversion, Places, convert, resource_name
from sae_job.errors import InvalidInput
from sae_operator.api.manifest import parse_manifests, read_yaml

CONVERT_EPILOG = (
    "Example: sae-job convert checkpoints/abc/final_122880000/cfg.json --output s3://saes/tinystories > sae-job.yaml"
)


def convert_configuration(
    config: Annotated[
        Path, typer.Argument(help="JSON or YAML file with the keys of SAELens 5's training configuration.")
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the resource; made of model and hook when left out.")
    ] = None,
    storage: Annotated[
        str, typer.Option("--storage", help="URI below which the cache of activations goes.")
    ] = "file://out/caches",
    output: Annotated[
        str | None, typer.Option("--output", help="URI of the job's output; file://out/NAME when left out.")
    ] = None,
) -> None:
    """Turn a training configuration of SAELens 5 into a manifest, on standard output.

    What could not be carried over as it is, and why, is told in comments above the manifest and on standard error.
    """
    values = read_configuration(config)
    chosen = resource_name(name) if name is not None else None
    done = convert(values, name=chosen, places=Places(storage, output or "file://out/job"))
    if output is None:
        done.manifest["spec"]["output"]["uri"] = f"file://out/{done.manifest['metadata']['name']}"
    text = as_yaml(done, source=config.name)
    # What is wrong with a value is told as for any manifest, before anybody runs it.
    parse_manifests(text, source=str(config))
    sys.stdout.write(text)
    for note in done.notes:
        print(f"sae-job: {note}", file=sys.stderr)


def read_configuration(path: Path) -> Mapping[str, object]:
    """The configuration in a JSON or YAML file.

    Raises:
        InvalidInput: it cannot be read, or is no mapping.
    """
    try:
        documents = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput("ConfigurationUnreadable", f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, YAMLError) as error:
        raise InvalidInput("ConfigurationUnreadable", f"{path} is neither JSON nor YAML") from error
    if len(documents) != 1 or not isinstance(documents[0], Mapping):
        raise InvalidInput("ConfigurationUnreadable", f"{path} must hold one mapping of keys to values")
    return documents[0]


def as_yaml(done: Conversion, *, source: str) -> str:
    """The manifest, with its notes as comments above it."""
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    buffer = io.StringIO()
    yaml.dump(done.manifest, buffer)
    notes = "".join(f"# - {note}\n" for note in done.notes)
    head = f"# Converted from {source}, a configuration of SAELens."
    return f"{head}\n" + (f"# Not carried over as it is:\n{notes}" if notes else "") + buffer.getvalue()
