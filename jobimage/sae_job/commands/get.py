"""`sae-job get`: the resources of a cluster, with the message that tells where each stands."""

from __future__ import annotations

import json
import shutil
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sae_job.commands.cluster_options import Context, Kubeconfig, Namespace, open_cluster

if TYPE_CHECKING:
    from sae_job.cluster.connection import Found

GET_EPILOG = (
    "sae-job get\n\nsae-job get saejob -A -o wide\n\nsae-job get sweep/k-by-rate -o json | jq '.[].status.best'"
)


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
    from sae_job.cluster.tables import headings, lines, row

    # Only a terminal has a width: what reads a pipe gets whole lines.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() and not wide else None
    now = datetime.now(UTC)
    for number, kind in enumerate({each.kind.kind: each.kind for each in found}.values()):
        rows = [row(each, now, namespaces=namespaces, wide=wide) for each in found if each.kind is kind]
        typer.echo("\n" * (number > 0) + kind.kind)
        for line in lines([headings(kind, namespaces=namespaces, wide=wide), *rows], width):
            typer.echo(line)
