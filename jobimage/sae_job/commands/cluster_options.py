"""The options that all commands share which talk to a cluster, and what they have in common."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sae_job.cluster.connection import Cluster

Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", help="Namespace; that of the kubeconfig's context.", show_default=False),
]
Kubeconfig = Annotated[
    Path | None,
    typer.Option("--kubeconfig", help="Kubeconfig file; KUBECONFIG, else ~/.kube/config.", show_default=False),
]
Context = Annotated[
    str | None, typer.Option("--context", help="Context of the kubeconfig; the current one.", show_default=False)
]
Reference = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Name of a resource; KIND/NAME, e.g. saejob/gpt2-l8, where it is not unique."),
]


def open_cluster(namespace: str | None, kubeconfig: Path | None, context: str | None) -> Cluster:
    """The cluster that the options name."""
    from sae_job.cluster.connection import connect

    # The client keeps the kubeconfig's keys in temporary files while it runs: they are removed on the way out.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        # `nohup` has one of them ignored.
        if signal.getsignal(ending) is not signal.SIG_IGN:
            signal.signal(ending, _end)
    return connect(kubeconfig=kubeconfig, context=context, namespace=namespace)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
