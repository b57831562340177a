"""`sae-job cache`: look after the caches of a store: list, inspect, verify, remove, and exchange with other libraries.

Nothing but these commands ever deletes a cache, and they delete only below a folder that carries our marker.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from sae_job.commands.place import (
    EndpointUrl,
    Json,
    Region,
    StoreRoot,
    format_age,
    format_bytes,
    open_place,
    parse_duration,
)

if TYPE_CHECKING:
    from sae_job.activations.listing import CacheSummary, FoundCache, Removal

app = typer.Typer(
    name="cache",
    help="Look after caches of activations: list, inspect, verify, remove, import and export them.",
    epilog="A URI is s3://bucket/prefix, file://path, or the path of a folder. Credentials come from the environment "
    "(AWS_ACCESS_KEY_ID, AWS_PROFILE, …), as AWS tools use them.",
    no_args_is_help=True,
)

CacheUri = Annotated[
    str, typer.Argument(metavar="URI", help="The cache's folder, as status.manifestUri and `cache ls` tell it.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Delete. Without it the command only says what it would delete.")]


@app.command(
    name="ls",
    epilog="sae-job cache ls s3://saes/caches\n\nsae-job cache ls ./store --json | jq '.[] | select(.bytes > 1e9)'",
)
def list_caches(
    uri: Annotated[str, typer.Argument(metavar="URI", help="Prefix to look below.")],
    as_json: Json = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    store: StoreRoot = None,
) -> None:
    """List the caches below a prefix: where, of what, how large, and when they were last used."""
    from sae_job.activations.listing import find_caches, summarize

    place = open_place(uri, endpoint_url=endpoint_url, region=region, store_root=store)
    found = summarize(find_caches(place))
    if as_json:
        _print_json([summary.to_json() for summary in found])
        return
    if not found:
        typer.echo(f"no caches below {place.uri}")
        return
    _print_summaries(found)


@app.command(
    name="rm",
    epilog="sae-job cache rm s3://saes/caches/team-a/0123456789abcdef\n\n"
    "sae-job cache rm --yes s3://saes/caches/team-a/0123456789abcdef",
)
def remove_caches(
    uris: Annotated[list[str], typer.Argument(metavar="URI...", help="Folders of the caches to remove.")],
    yes: Yes = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    store: StoreRoot = None,
) -> None:
    """Remove caches. Without --yes nothing is deleted: the command says what would go.

    Only a folder that carries our marker is touched, and in it only what we write. A removal that is interrupted is
    continued by the same command; until then the rest is no finished cache.
    """
    from sae_job.activations.listing import plan_removal

    removals = [
        plan_removal(open_place(uri, endpoint_url=endpoint_url, region=region, store_root=store)) for uri in uris
    ]
    for removal in removals:
        _remove(removal, yes=yes)
    _tell_dry_run(removals, yes=yes)


@app.command(
    name="gc",
    epilog="sae-job cache gc s3://saes/caches --unused-for 30d\n\n"
    "sae-job cache gc s3://saes/caches --unused-for 30d --yes",
)
def collect_unused(
    uri: Annotated[str, typer.Argument(metavar="URI", help="Prefix to look below.")],
    unused_for: Annotated[
        str,
        typer.Option(
            "--unused-for",
            help="Remove caches that nobody has written or read for so long, e.g. 30d or 12h. Longer than the longest "
            "training run: a job records its use when it starts.",
            show_default=False,
        ),
    ],
    yes: Yes = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    store: StoreRoot = None,
) -> None:
    """Remove the caches below a prefix that have not been used for a while. Without --yes nothing is deleted.

    A cache is used when one of its objects is written, which a build does all the time, and when a training job starts
    to read it. What does not carry our marker is never touched.
    """
    from sae_job.activations.listing import find_caches, plan_removal

    limit = parse_duration(unused_for)
    place = open_place(uri, endpoint_url=endpoint_url, region=region, store_root=store)
    caches = find_caches(place)
    removals: list[Removal] = []
    for cache in caches:
        if not cache.unused_for(limit, datetime.now(UTC)):
            continue
        # Looked at again: somebody may have begun to use it since the listing.
        removal = plan_removal(cache.store)
        if removal.cache.unused_for(limit, datetime.now(UTC)):
            _remove(removal, yes=yes)
            removals.append(removal)
    typer.echo(f"{len(removals)} of {len(caches)} caches below {place.uri} are unused for {unused_for}")
    _tell_dry_run(removals, yes=yes)


def _remove(removal: Removal, *, yes: bool) -> None:
    """Remove a cache, or say what that would delete."""
    from sae_job.activations.listing import remove

    cache = removal.cache
    if yes:
        remove(removal)
    typer.echo(
        f"{'deleted' if yes else 'would delete'} {cache.uri}: {cache.objects} objects, {format_bytes(cache.bytes)}, "
        f"last used {_last_used(cache)}"
    )
    if removal.left:
        more = ", …" if len(removal.left) > 3 else ""
        typer.echo(f"  {len(removal.left)} objects there are not ours and stay: {', '.join(removal.left[:3])}{more}")


def _tell_dry_run(removals: list[Removal], *, yes: bool) -> None:
    if removals and not yes:
        size = format_bytes(sum(removal.cache.bytes for removal in removals))
        typer.echo(f"nothing was deleted; add --yes to free {size}")


def _last_used(cache: FoundCache) -> str:
    if cache.last_used is None:
        return "at an unknown time"
    return f"{format_age(datetime.now(UTC) - cache.last_used)} ago"


def _print_summaries(found: list[CacheSummary]) -> None:
    from rich.console import Console
    from rich.table import Table

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
            _last_used(summary.cache),
            summary.state,
        )
    console = Console()
    console.print(table)
    for summary in found:
        # Outside the table, whose columns would cut what is to be copied.
        console.print(f"{summary.cache.identity}  {summary.cache.uri}", soft_wrap=True, highlight=False, markup=False)


def _print_json(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
