"""Resources as rows: the columns of `kubectl get`, and what each resource says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sae_job.cluster.connection import Found
from sae_operator.api.crd import PRINTER_COLUMNS
from sae_operator.api.resources import Kind

NOTHING = "–"
# Terminals obey these: a text of a cluster must not.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
# Of the message in a narrow terminal.
LEAST_MESSAGE = 20
GAP = "  "
_UNITS = ((86_400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def headings(kind: Kind, *, namespaces: bool, wide: bool) -> list[str]:
    """Headings of a kind's table."""
    columns = [column["name"] for column in _columns(kind, wide)]
    return [*(["Namespace"] if namespaces else []), "Name", *columns, "Message"]


def row(found: Found, now: datetime, *, namespaces: bool, wide: bool) -> list[str]:
    """Cells of a resource's row, in the order of `headings`."""
    cells = [_cell(found.body, column, now) for column in _columns(found.kind, wide)]
    return [*([found.namespace] if namespaces else []), found.name, *cells, message(found)]


def lines(cells: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Rows as aligned lines. The last column, the message, is cut to `width`; names and figures never are."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    room = None if width is None else max(LEAST_MESSAGE, width - sum(widths) - len(GAP) * len(widths))
    told = []
    for *firsts, last in cells:
        if room is not None and len(last) > room:
            last = f"{last[: room - 1]}…"
        told.append(GAP.join([*map(str.ljust, firsts, widths), last]).rstrip())
    return told


def plain(text: str) -> str:
    """A text on one line, without what terminals would obey."""
    return _CONTROL.sub(" ", text)


def message(found: Found) -> str:
    """What the resource says of itself: its findings where there are some, else its Ready condition."""
    told = conditions(found)
    findings = [
        f"{name}: {condition.get('message', '')}"
        for name, condition in told.items()
        if name not in ("Ready", "Reconciling", "Stalled") and condition.get("status") != "False"
    ]
    ready = told.get("Ready", {})
    return plain(findings[0] if findings and ready.get("status") != "True" else ready.get("message", ""))


def conditions(found: Found) -> dict[str, Mapping[str, Any]]:
    """Conditions by type."""
    return {condition["type"]: condition for condition in found.status.get("conditions") or []}


def outcome(found: Found) -> str | None:
    """`done` or `failed` once the resource's current spec is one or the other; None while there is work or a pause."""
    if found.status.get("observedGeneration") != found.body["metadata"].get("generation"):
        return None
    told = conditions(found)
    if told.get("Stalled", {}).get("status") == "True":
        return "failed"
    return "done" if told.get("Ready", {}).get("status") == "True" else None


def age(since: str | None, now: datetime) -> str:
    """Time since an RFC 3339 moment in its largest unit, as kubectl tells it."""
    if not since:
        return NOTHING
    seconds = max(0, int((now - datetime.fromisoformat(since)).total_seconds()))
    length, unit = next((each for each in _UNITS if seconds >= each[0]), _UNITS[-1])
    return f"{seconds // length}{unit}"


def _columns(kind: Kind, wide: bool) -> Sequence[Mapping[str, Any]]:
    return [column for column in PRINTER_COLUMNS[kind.kind] if wide or not column.get("priority")]


def _cell(body: Mapping[str, Any], column: Mapping[str, Any], now: datetime) -> str:
    value: Any = body
    for part in column["jsonPath"].removeprefix(".").split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if column["type"] == "date":
        return age(value, now)
    if value is None:
        return NOTHING
    return f"{value:,}" if column["type"] == "integer" else str(value)
