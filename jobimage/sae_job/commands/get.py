"""`sae-job get`: the resources of a cluster, with the message that tells where each stands."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sae_job.commands.cluster_options import Context, Kubeconfig, Namespace, open_cluster

if TYPE_CHECKING:
    from sae_job.cluster.connection import Found

GET_EPILOG = "sae-job get\n\nsae-job get saejob -A -o wide\n\nsae-job get sweep/k-by-rate -o json | jq .status.best"


def get(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND | NAME | KIND/NAME]",
            help="saejob, actcache or sweep for all of a kind, or one resource; everything by default.",
            show_default=False,
        ),
    ] = None,
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="Resources of every namespace.")
    ] = False,
    output: Annotated[
        Literal["table", "wide", "json"], typer.Option("--output", "-o", help="How to show them.")
    ] = "table",
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """List caches, training jobs and sweeps of a cluster: where each stands, and why."""
    from sae_job.cluster.connection import kind_named
    from sae_job.errors import InvalidInput
    from sae_operator.api.resources import KINDS

    cluster = open_cluster(namespace, kubeconfig, context)
    kinds = list(KINDS.values())
    found: list[Found]
    try:
        chosen = kinds if what is None else [kind_named(what)]
    except InvalidInput:
        found = [cluster.find(what or "")]
    else:
        found = [each for kind in chosen for each in cluster.list(kind, all_namespaces=all_namespaces)]
    if output == "json":
        typer.echo(json.dumps([each.body for each in found], indent=2))
        return
    if not found:
        where = "any namespace" if all_namespaces else f"namespace {cluster.namespace}"
        typer.echo(f"no resources in {where}")
        return
    _print_tables(found, namespaces=all_namespaces, wide=output == "wide")


def _print_tables(found: list[Found], *, namespaces: bool, wide: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from sae_job.cluster.tables import headings, row

    console, now = Console(), datetime.now(UTC)
    for kind in {each.kind.kind: each.kind for each in found}.values():
        table = Table(title=kind.kind, title_justify="left", box=None, pad_edge=False)
        names = headings(kind, namespaces=namespaces, wide=wide)
        for name in names[:-1]:
            table.add_column(name, no_wrap=True)
        # Only the message gives way: names and figures are never cut.
        table.add_column(names[-1], overflow="fold" if wide else "ellipsis", no_wrap=not wide, ratio=1)
        for each in found:
            if each.kind is kind:
                table.add_row(*row(each, now, namespaces=namespaces, wide=wide))
        console.print(table)
