"""`sae-job pull` and `sae-job report`: results of a job or a sweep, out of the store onto this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_job.commands.cluster_options import Context, Kubeconfig, Namespace, Reference, open_cluster
from sae_job.commands.place import EndpointUrl, StoreRoot, format_bytes
from sae_job.errors import InvalidInput

if TYPE_CHECKING:
    from sae_job.cluster.connection import Found
    from sae_job.storage.base import ObjectInfo, ObjectStore

PULL_EPILOG = (
    "sae-job pull gpt2-l8\n\nsae-job pull gpt2-l8 ./saes --sae k32\n\nsae-job pull sweep/k-by-rate ./best --best\n\n"
    "From outside the cluster an S3 server within it is reached by `kubectl port-forward` and --endpoint-url."
)
REPORT_EPILOG = "sae-job report gpt2-l8 --open\n\nsae-job report sweep/k-by-rate -o sweep.html"
REPORT_KEY = "report.html"


def pull(
    reference: Reference,
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Folder to write; NAME by default.", show_default=False)
    ] = None,
    sae: Annotated[
        list[str] | None, typer.Option("--sae", help="Only this SAE; may be given several times.", show_default=False)
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="Sweep: only its report, table and best trial.")] = False,
    everything: Annotated[bool, typer.Option("--everything", help="Checkpoints and other working files, too.")] = False,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    endpoint_url: EndpointUrl = None,
    store: StoreRoot = None,
) -> None:
    """Copy the results of a job or a sweep here: SAEs, metrics and report. Files that are here already are left out."""
    from sae_job.cluster.results import Access, open_results, result_files

    cluster = open_cluster(namespace, kubeconfig, context)
    found = cluster.find(reference)
    target = folder or Path(found.name)
    with open_results(cluster, found, Access(endpoint_url, store)) as results:
        files = result_files(results, working=everything)
        if best:
            files = _of_best(found, files)
        if sae:
            files = _of_saes(found, files, sae)
        if not files:
            message = f"{found.label} has left nothing at {results.uri} yet ({found.status.get('phase')})"
            raise InvalidInput("NoResults", message)
        _copy(results, files, target)
    typer.echo(f"{len(files)} files, {format_bytes(sum(each.size for each in files))}, in {target}")


def report(
    reference: Reference,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; NAME-report.html by default.", show_default=False),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    endpoint_url: EndpointUrl = None,
    store: StoreRoot = None,
) -> None:
    """Copy the report of a finished job or sweep here, and show its figures."""
    from rich.console import Console

    from sae_job.cluster.results import Access, open_results, writing
    from sae_job.cluster.view import render
    from sae_job.storage.base import ObjectNotFound

    cluster = open_cluster(namespace, kubeconfig, context)
    found = cluster.find(reference)
    path = output or Path(f"{found.name}-report.html")
    with open_results(cluster, found, Access(endpoint_url, store)) as results:
        try:
            page = results.get(REPORT_KEY)
        except ObjectNotFound as error:
            phase = found.status.get("phase") or "Pending"
            message = f"{found.label} has no report yet: it is {phase}; `sae-job watch {found.name}` waits for it"
            raise InvalidInput("NoReport", message) from error
    with writing(path):
        path.write_bytes(page)
    Console().print(render(found))
    typer.echo(f"report  {path}")
    if open_it:
        typer.launch(path.resolve().as_uri())


def _of_saes(found: Found, files: list[ObjectInfo], names: list[str]) -> list[ObjectInfo]:
    """The files in the folders of some SAEs, wherever they lie in a sweep."""
    folders = {part for each in files for part in each.key.split("/")[:-1]}
    missing = [name for name in names if name not in folders]
    if missing:
        known = ", ".join(sorted(folder for folder in folders)) or "none"
        message = f"{found.label} has no SAE named {missing[0]!r} in the store; there are {known}"
        raise InvalidInput("NoSuchSae", message)
    return [each for each in files if set(each.key.split("/")[:-1]) & set(names)]


def _of_best(found: Found, files: list[ObjectInfo]) -> list[ObjectInfo]:
    """A sweep's own files and those of its best trial."""
    ranked = found.status.get("best") or []
    if not ranked:
        raise InvalidInput("NoBest", f"{found.label} has no best trial; --best is for a sweep with finished trials")
    name = ranked[0]["name"]
    return [each for each in files if "/" not in each.key or any(_is_of(name, part) for part in each.key.split("/"))]


def _is_of(trial: str, folder: str) -> bool:
    return folder == trial or folder.startswith(f"{trial}-")


def _copy(store: ObjectStore, files: list[ObjectInfo], target: Path) -> None:
    from sae_job.cluster.results import download, is_current
    from sae_job.commands.bars import progress_bar

    total, done = sum(each.size for each in files), 0
    with progress_bar("pull", "bytes") as progress:
        for each in files:
            path = target / each.key
            if not path.resolve().is_relative_to(target.resolve()):
                raise InvalidInput("UnsafeKey", f"{store.uri}/{each.key} would lie outside {target}")
            if is_current(each, path):
                done += each.size
            else:
                for count in download(store, each, path):
                    done += count
                    progress(done, total)
            progress(done, total)
