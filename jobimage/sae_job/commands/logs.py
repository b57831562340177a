"""`sae-job logs`: what a resource's pods say, or said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_job.commands.cluster_options import Context, Kubeconfig, Namespace, Reference, open_cluster
from sae_job.commands.place import EndpointUrl, StoreRoot
from sae_job.errors import InvalidInput

if TYPE_CHECKING:
    from sae_job.cluster.connection import Cluster, Found

LOGS_EPILOG = "sae-job logs gpt2-l8 -f\n\nsae-job logs gpt2-l8 --step preflight\n\nsae-job logs actcache/l8 --index 3"
LABEL_STEP = "sae-operator.dev/step"
INDEX = "batch.kubernetes.io/job-completion-index"
LOG_KEY = "log.txt"


def logs(
    reference: Reference,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what the pod says from now on.")] = False,
    step: Annotated[
        str | None,
        typer.Option("--step", help="preflight, train, prepare, cache, finalize or report.", show_default=False),
    ] = None,
    index: Annotated[
        int | None, typer.Option("--index", min=0, help="Pod of several that work together.", show_default=False)
    ] = None,
    tail: Annotated[int | None, typer.Option("--tail", min=1, help="Only the last lines.", show_default=False)] = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    endpoint_url: EndpointUrl = None,
    store: StoreRoot = None,
) -> None:
    """Print the log of a resource's newest pod; of a job whose pods are gone, the log in the store, of all attempts."""
    cluster = open_cluster(namespace, kubeconfig, context)
    found = cluster.find(reference)
    pod = newest_pod(cluster.pods(found), step=step, index=index)
    if pod is not None:
        typer.echo(f"pod {pod['metadata']['name']}", err=True)
        lines = cluster.log(found.namespace, pod["metadata"]["name"], follow=follow, tail=tail)
    elif step is not None or index is not None:
        raise InvalidInput("NoPod", f"{found.label} has no pod of that step and index now")
    else:
        lines = _stored_log(cluster, found, endpoint_url, store, tail)
    for line in lines:
        typer.echo(line)


def newest_pod(pods: Sequence[Mapping[str, Any]], *, step: str | None, index: int | None) -> Mapping[str, Any] | None:
    """The last pod that was made, of pods that work together the first one, which speaks for all."""

    def index_of(pod: Mapping[str, Any]) -> int:
        return int((pod["metadata"].get("annotations") or {}).get(INDEX) or 0)

    chosen = [
        pod
        for pod in pods
        if (step is None or pod["metadata"]["labels"].get(LABEL_STEP) == step)
        and (index is None or index_of(pod) == index)
    ]
    if not chosen:
        return None
    newest = chosen[-1]["metadata"]["labels"].get(LABEL_STEP)
    of_step = [pod for pod in chosen if pod["metadata"]["labels"].get(LABEL_STEP) == newest]
    lowest = min(index_of(pod) for pod in of_step)
    return [pod for pod in of_step if index_of(pod) == lowest][-1]


def _stored_log(
    cluster: Cluster, found: Found, endpoint_url: str | None, store_root: Any, tail: int | None
) -> Iterator[str]:
    from sae_job.cluster.results import Access, open_results
    from sae_job.storage.base import ObjectNotFound

    with open_results(cluster, found, Access(endpoint_url, store_root)) as store:
        try:
            text = store.get(LOG_KEY).decode(errors="replace")
        except ObjectNotFound as error:
            message = f"{found.label} has no pods now, and no log at {store.uri}/{LOG_KEY}"
            raise InvalidInput("NoLog", message) from error
    typer.echo(f"the pods are gone; {store.uri}/{LOG_KEY}", err=True)
    lines = text.splitlines()
    yield from lines if tail is None else lines[-tail:]
