"""Where a command's data lies: the options that all commands with a URI share, and how they become a store."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectStore
from sae_operator.api.store import StoreLocation

EndpointUrl = Annotated[
    str | None,
    typer.Option(
        "--endpoint-url", help="Address of an S3-compatible server; AWS, or AWS_ENDPOINT_URL.", show_default=False
    ),
]
Region = Annotated[str | None, typer.Option("--region", help="Region of the bucket.", show_default=False)]
StoreRoot = Annotated[
    Path | None,
    typer.Option(
        "--store",
        help="Folder that stands in for object storage, as in `sae-job run`: s3://bucket/key is DIR/bucket/key.",
        metavar="DIR",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")


def open_place(uri: str, *, endpoint_url: str | None, region: str | None, store_root: Path | None) -> ObjectStore:
    """The store at a URI, or at the path of a folder; credentials are those of the environment, as AWS tools use them.

    Raises:
        InvalidInput: no URI of a known scheme, or a broken one.
    """
    from pydantic import ValidationError

    from sae_job.storage.open import open_store

    located = uri if "://" in uri else f"file://{os.path.abspath(uri)}"
    try:
        location = StoreLocation(uri=located, endpoint_url=endpoint_url, region=region)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "uri"
        raise InvalidInput("InvalidUri", f"{uri!r}: {field}: {first['msg']}") from error
    return open_store(location, local_root=store_root)


def parse_duration(text: str) -> timedelta:
    """A duration such as `30d`, `12h` or `1.5w`: seconds, minutes, hours, days, weeks.

    Raises:
        InvalidInput: something else.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise InvalidInput("InvalidDuration", f"{text!r} is no duration: write e.g. 30d, 12h or 90m (s, m, h, d, w)")
    return timedelta(seconds=float(match[1]) * _UNITS[match[2]])


def format_bytes(count: int) -> str:
    """Bytes in the unit that people read: 1.5 GB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("the last unit takes everything")


def format_age(age: timedelta) -> str:
    """An age in its largest unit: 3 d."""
    seconds = max(age.total_seconds(), 0)
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"
