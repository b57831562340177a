"""What people read of caches: tables of `sae-job cache ls` and `inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sae_job.commands.place import format_age, format_bytes

if TYPE_CHECKING:
    from sae_job.activations.listing import CacheSummary, FoundCache


def last_used(cache: FoundCache) -> str:
    """How long ago a cache was used."""
    if cache.last_used is None:
        return "at an unknown time"
    return f"{format_age(datetime.now(UTC) - cache.last_used)} ago"


def print_summaries(found: Sequence[CacheSummary]) -> None:
    """A row for each cache, and below them where they lie."""
    table = Table()
    for heading in ("identity", "model", "hooks", "rows", "bytes", "last used", "state"):
        table.add_column(heading, justify="right" if heading in ("rows", "bytes") else "left")
    for summary in found:
        table.add_row(
            summary.cache.identity,
            summary.model,
            ", ".join(summary.hooks),
            "–" if summary.rows is None else f"{summary.rows:,}",
            format_bytes(summary.cache.bytes),
            last_used(summary.cache),
            summary.state,
        )
    console = Console()
    console.print(table)
    for summary in found:
        # Outside the table, whose columns would cut what is to be copied.
        _line(console, f"{summary.cache.identity}  {summary.cache.uri}")


def print_facts(facts: Mapping[str, Any]) -> None:
    """What `inspect_cache` tells: facts of the whole, a table of the hooks, and the provenance."""
    console = Console()
    _line(console, f"{facts['uri']}: {facts['state'].lower()}")
    if "rows" in facts:
        _line(console, _size(facts))
    if "dtype" in facts:
        _line(console, f"{facts['dtype']}, identity {facts['identity']}, format {facts['formatVersion']}")
    if "hooks" in facts:
        console.print(_hooks(facts["hooks"]))
    for name in ("model", "dataset", "tokenizer", "sampling"):
        if facts.get(name):
            _line(console, f"{name:<10} {_words(facts[name])}")
    if "seed" in facts:
        _line(console, f"{'seed':<10} {facts['seed']}")
    if "software" in facts:
        _line(console, f"{'software':<10} {'; '.join(_words(versions) for versions in facts['software'])}")
        _line(console, f"{'devices':<10} {', '.join(facts['devices'])}")


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """What `first_stored_rows` tells."""
    table = Table(title="first rows, as they are stored", title_justify="left")
    hooks = list(rows[0]["norms"]) if rows else []
    for heading in ("context", "position", "token id", *(f"norm at {hook}" for hook in hooks)):
        table.add_column(heading, justify="right")
    for row in rows:
        norms = (f"{row['norms'][hook]:.4g}" for hook in hooks)
        table.add_row(str(row["context"]), str(row["position"]), str(row["tokenId"]), *norms)
    Console().print(table)


def _size(facts: Mapping[str, Any]) -> str:
    parts = [f"{facts['rows']:,} rows", f"contexts of {facts['contextSize']}", f"{facts['shards']} shards"]
    if "storedParts" in facts:
        parts.append(f"{facts['storedParts']} files of them stored")
    parts.append(format_bytes(facts["bytes"]))
    if "bytesPerRow" in facts:
        parts.append(f"{facts['bytesPerRow']:.1f} bytes per row")
    return ", ".join(parts)


def _hooks(hooks: Sequence[Mapping[str, Any]]) -> Table:
    table = Table()
    columns = (
        ("hook", "name", ""),
        ("dIn", "dIn", "d"),
        ("rows", "rows", ",d"),
        ("mean norm", "meanNorm", ".4g"),
        ("RMS norm", "rmsNorm", ".4g"),
        ("median norm", "medianNorm", ".4g"),
    )
    shown = [column for column in columns if any(column[1] in hook for hook in hooks)]
    for heading, _, form in shown:
        table.add_column(heading, justify="right" if form else "left")
    for hook in hooks:
        values = ((hook.get(name), form) for _, name, form in shown)
        table.add_row(*("–" if value is None else format(value, form) for value, form in values))
    return table


def _words(value: Any) -> str:
    """JSON as people write it: `name: gpt2, revision: main`; long lists by their beginning."""
    if isinstance(value, Mapping):
        told = ((name, inner) for name, inner in value.items() if inner not in (None, [], {}))
        return ", ".join(
            f"{name}: ({_words(inner)})" if isinstance(inner, Mapping) else f"{name}: {_words(inner)}"
            for name, inner in told
        )
    if isinstance(value, list):
        more = f" and {len(value) - 8} more" if len(value) > 8 else ""
        return f"[{', '.join(_words(inner) for inner in value[:8])}{more}]"
    return str(value)


def _line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
