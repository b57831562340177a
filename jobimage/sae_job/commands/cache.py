"""`sae-job cache`: look after the caches of a store: list, inspect, verify, remove, and exchange with other libraries.

Nothing but these commands ever deletes a cache, and they delete only below a folder that carries our marker.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from sae_job.commands.bars import progress_bar
from sae_job.commands.cache_exchange import EXPORT_EPILOG, IMPORT_EPILOG, export_cache, import_dataset
from sae_job.commands.place import (
    EndpointUrl,
    Json,
    Region,
    StoreRoot,
    format_bytes,
    open_place,
    parse_duration,
)
from sae_operator.api.steps import ExitCode

if TYPE_CHECKING:
    from sae_job.activations.listing import Removal

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
    from sae_job.commands.cache_tables import print_summaries

    place = open_place(uri, endpoint_url=endpoint_url, region=region, store_root=store)
    found = summarize(find_caches(place))
    if as_json:
        _print_json([summary.to_json() for summary in found])
        return
    if not found:
        typer.echo(f"no caches below {place.uri}")
        return
    print_summaries(found)


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

    Only a folder that carries our marker is touched, and in it only what we write.
    A removal that is interrupted is continued by the same command; until then the rest is no finished cache.
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

    A cache is used when one of its objects is written, which a build does all the time.
    It is used, too, when a training job starts to read it.
    What does not carry our marker is never touched.
    """
    limit = parse_duration(unused_for)
    from sae_job.activations.listing import find_caches, plan_removal

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


@app.command(
    epilog="sae-job cache inspect s3://saes/caches/team-a/0123456789abcdef\n\n"
    "sae-job cache inspect ./store/caches/default/0123456789abcdef --json | jq .model\n\n"
    "sae-job cache inspect ./store/caches/default/0123456789abcdef --rows 20",
)
def inspect(
    uri: CacheUri,
    rows: Annotated[
        int, typer.Option("--rows", min=0, max=10_000, help="Show the first so many rows, too: tokens and norms.")
    ] = 0,
    as_json: Json = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    store: StoreRoot = None,
) -> None:
    """Tell what a cache is: hooks with their norms, rows, bytes, and where its rows came from."""
    from sae_job.activations.inspection import first_stored_rows, inspect_cache
    from sae_job.commands.cache_tables import print_facts, print_rows

    place = open_place(uri, endpoint_url=endpoint_url, region=region, store_root=store)
    facts = inspect_cache(place)
    first = first_stored_rows(place, rows) if rows else []
    if as_json:
        _print_json(facts | {"firstRows": first} if rows else facts)
        return
    print_facts(facts)
    if rows:
        print_rows(first)


@app.command(
    epilog="sae-job cache verify s3://saes/caches/team-a/0123456789abcdef\n\n"
    "sae-job cache verify ./store/caches/default/0123456789abcdef --no-statistics --threads 4",
)
def verify(
    uri: CacheUri,
    statistics: Annotated[
        bool, typer.Option(help="Compute the statistics of all rows anew, and compare them with the manifest's.")
    ] = True,
    threads: Annotated[
        int, typer.Option("--threads", min=1, max=64, help="Shards checked at a time; memory is one shard for each.")
    ] = 2,
    as_json: Json = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    store: StoreRoot = None,
) -> None:
    """Read a whole cache and compare every byte, shape, row and statistic with what it says of itself.

    Exit code 0 when all is well; 2 with a line for each problem, which names shard, object and fix.
    Of a cache that is not finished, what is stored so far is checked.
    """
    from sae_job.activations.verify import verify_cache

    place = open_place(uri, endpoint_url=endpoint_url, region=region, store_root=store)
    with progress_bar("verify", "bytes") as progress:
        found = verify_cache(place, statistics=statistics, threads=threads, progress=progress)
    if as_json:
        _print_json(found.to_json())
    else:
        for problem in found.problems:
            typer.echo(f"sae-job: {problem}", err=True)
        for key in found.orphans:
            typer.echo(f"nothing lists {found.uri}/{key}: of an earlier state of the cache, or not ours")
        state = "finished" if found.finished else "not finished (no manifest)"
        typer.echo(
            f"{found.uri} is {state}: {found.rows:,} rows in {found.parts} files of shards "
            f"({format_bytes(found.bytes)}) and {found.blocks} blocks of contexts were checked; "
            f"{len(found.problems) or 'no'} problem{'' if len(found.problems) == 1 else 's'}"
        )
    if found.problems:
        raise typer.Exit(ExitCode.INVALID)


app.command(name="export", epilog=EXPORT_EPILOG)(export_cache)
app.command(name="import", epilog=IMPORT_EPILOG)(import_dataset)


def _remove(removal: Removal, *, yes: bool) -> None:
    """Remove a cache, or say what that would delete."""
    from sae_job.activations.listing import remove
    from sae_job.commands.cache_tables import last_used

    cache = removal.cache
    if yes:
        with progress_bar("delete", "objects") as progress:
            remove(removal, progress=lambda done: progress(done, len(removal.keys)))
    typer.echo(
        f"{'deleted' if yes else 'would delete'} {cache.uri}: {cache.objects} objects, {format_bytes(cache.bytes)}, "
        f"last used {last_used(cache)}"
    )
    if removal.left:
        more = ", …" if len(removal.left) > 3 else ""
        typer.echo(f"  {len(removal.left)} objects there are not ours and stay: {', '.join(removal.left[:3])}{more}")


def _tell_dry_run(removals: list[Removal], *, yes: bool) -> None:
    if removals and not yes:
        size = format_bytes(sum(removal.cache.bytes for removal in removals))
        typer.echo(f"nothing was deleted; add --yes to free {size}")


def _print_json(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
