"""`sae-job watch`: one resource until it has ended."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from sae_job.commands.cluster_options import Context, Kubeconfig, Namespace, Reference, open_cluster
from sae_operator.api.steps import ExitCode

if TYPE_CHECKING:
    from rich.console import Console

    from sae_job.cluster.connection import Found

WATCH_EPILOG = "sae-job watch gpt2-l8 && sae-job pull gpt2-l8\n\nsae-job watch sweep/k-by-rate --timeout 3600"
# Without a terminal, progress alone is told this often.
PLAIN_EVERY_SECONDS = 15.0
# As of timeout(1): a script may wait on, where a failure is final.
TIMED_OUT = 124


def watch(
    reference: Reference,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, help="Give up after so many seconds; never.", show_default=False)
    ] = math.inf,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Show a resource's progress and figures until it has ended: exit code 0 when it succeeded, 1 when it failed or was
    deleted, 124 when --timeout came first."""
    from rich.console import Console

    cluster = open_cluster(namespace, kubeconfig, context)
    found = cluster.find(reference)
    states = _until_ended(cluster.watch(found, seconds=timeout))
    console = Console()
    last = _show_live(states, console) if console.is_terminal else _show_lines(states)
    raise typer.Exit(_exit_code(found, last))


def _until_ended(states: Iterator[Found | None]) -> Iterator[Found | None]:
    """The states up to the one with which the resource has ended."""
    from sae_job.cluster.tables import outcome

    for state in states:
        yield state
        if state is None or outcome(state) is not None:
            return


def _show_live(states: Iterator[Found | None], console: Console) -> Found | None:
    from rich.live import Live

    from sae_job.cluster.view import render

    last = None
    with Live(console=console, refresh_per_second=4) as live:
        for last in states:
            if last is not None:
                live.update(render(last))
    return last


def _show_lines(states: Iterator[Found | None]) -> Found | None:
    """A line whenever something has happened, and now and then while only figures change."""
    from sae_job.cluster.tables import message, outcome
    from sae_job.cluster.view import headline

    last, told, told_at = None, None, float("-inf")
    for last in states:
        if last is None:
            break
        now, news = time.monotonic(), (last.status.get("phase"), message(last))
        if news != told or outcome(last) is not None or now - told_at >= PLAIN_EVERY_SECONDS:
            typer.echo(headline(last))
            told, told_at = news, now
    return last


def _exit_code(found: Found, last: Found | None) -> int:
    from sae_job.cluster.tables import outcome

    if last is None:
        typer.echo(f"{found.label} was deleted", err=True)
        return ExitCode.FAILED
    ended = outcome(last)
    if ended is None:
        typer.echo(f"{found.label} has not ended yet", err=True)
        return TIMED_OUT
    return ExitCode.DONE if ended == "done" else ExitCode.FAILED
