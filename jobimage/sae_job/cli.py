"""The command line `sae-job`: validate and run manifests, and the steps that pods run.

Heavy imports stand inside the commands that need them, so that `--help` and `validate` answer at once.
"""

from __future__ import annotations

import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_job.commands import cache as cache_commands
from sae_job.commands.convert import CONVERT_EPILOG, convert_configuration
from sae_job.commands.doctor import DOCTOR_EPILOG, doctor
from sae_job.commands.get import GET_EPILOG, get
from sae_job.commands.logs import LOGS_EPILOG, logs
from sae_job.commands.pretokenize import PRETOKENIZE_EPILOG, pretokenize
from sae_job.commands.pull import PULL_EPILOG, REPORT_EPILOG, pull, report
from sae_job.commands.sweep_results import exit_code, show_sweep
from sae_job.commands.validate import Files, advice_for, validate
from sae_job.commands.watch import WATCH_EPILOG, watch
from sae_job.errors import ClusterUnavailable, InvalidInput, Stopped
from sae_job.storage.base import StoreError
from sae_operator import __version__
from sae_operator.api.manifest import ManifestError, load_manifests
from sae_operator.api.resources import Resource
from sae_operator.api.steps import ExitCode

if TYPE_CHECKING:
    from rich.console import Console

    from sae_job.steps.local import JobOutcome

app = typer.Typer(
    name="sae-job",
    help="Cache the activations of language models and train sparse autoencoders from them.",
    epilog="The same manifests run here (`sae-job run -f FILE`) and in a cluster (`kubectl apply -f FILE`).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(cache_commands.app)
app.command(epilog=PRETOKENIZE_EPILOG)(pretokenize)
app.command()(validate)
app.command(epilog=DOCTOR_EPILOG)(doctor)
app.command("convert", epilog=CONVERT_EPILOG)(convert_configuration)
for command, epilog in (
    (get, GET_EPILOG),
    (watch, WATCH_EPILOG),
    (logs, LOGS_EPILOG),
    (pull, PULL_EPILOG),
    (report, REPORT_EPILOG),
):
    app.command(epilog=epilog, rich_help_panel="In a cluster")(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sae-job {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _load(files: list[Path]) -> list[Resource]:
    return [resource for file in files for resource in load_manifests(file)]


@app.command()
def run(
    filename: Files,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store",
            help="Folder that stands in for object storage: s3://bucket/key is DIR/bucket/key.",
            metavar="DIR",
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the steps' log.")] = False,
) -> None:
    """Run manifests in this process, without a cluster.

    Caches activations, then trains the SAEs from them. An interrupted run continues with the same command. Of a sweep,
    training jobs run one after the other; exit code 1 when some of its trials failed.
    """
    from rich.console import Console

    from sae_job.reporting.bars import step_bar
    from sae_job.steps.local import run_resources

    shown = logging.StreamHandler()
    # On the handler: the steps' loggers also feed log.txt, which takes more.
    shown.setLevel(logging.INFO if verbose else logging.WARNING)
    logging.basicConfig(level=shown.level, format="%(levelname)s %(name)s: %(message)s", handlers=[shown])
    resources = _load(filename)
    for resource in resources:
        for warning in advice_for(resource):
            print(f"warning: {resource.kind.kind}/{resource.name}: {warning}", file=sys.stderr)
    # Paths and values are shown as they are: brackets would be taken for markup, and colons for emoji.
    console = Console(markup=False, emoji=False)
    outcomes = run_resources(
        resources, store_root=store, display=partial(step_bar, console=console, clock=time.monotonic)
    )
    for outcome in outcomes.jobs:
        show_results(outcome, store, console)
    for sweep in outcomes.sweeps:
        show_sweep(sweep, _place(sweep.output.uri, store), console)
    if code := max((exit_code(sweep) for sweep in outcomes.sweeps), default=ExitCode.DONE):
        raise typer.Exit(code)


@app.command()
def step(
    name: Annotated[str, typer.Argument(help="preflight, prepare, cache, finalize, train or report.")],
    spec: Annotated[Path, typer.Argument(help="JSON file with the step's spec.")],
) -> None:
    """Run one step as a pod does; the operator writes its spec."""
    from sae_job.steps.step import run_step_process

    raise typer.Exit(run_step_process(name, spec))


def show_results(outcome: JobOutcome, store: Path | None, console: Console) -> None:
    """The table of a job's results, and where they lie."""
    from rich.table import Table

    table = Table(title=f"{outcome.name}: {outcome.result.tokens or 0:,} tokens", title_justify="left")
    for heading in ("SAE", "explained variance", "L0", "MSE", "CE-loss score", "dead"):
        table.add_column(heading, justify="left" if heading == "SAE" else "right")
    for sae in outcome.result.saes or []:
        if sae.phase == "Failed":
            table.add_row(sae.name, "failed")
            continue
        figures = (
            (sae.explained_variance, ".4f"),
            (sae.l0, ".2f"),
            (sae.mse, ".4g"),
            (sae.ce_loss_score, ".4f"),
            (sae.dead_fraction, ".1%"),
        )
        table.add_row(sae.name, *("–" if value is None else format(value, form) for value, form in figures))
    console.print(table)
    place = _place(outcome.output.uri, store)
    for sae in outcome.result.saes or []:
        # Outside the table: its columns would cut the field to change.
        if sae.phase in ("Failed", "Stopped"):
            told = f"{sae.phase.lower():<8}{sae.name}: {sae.message}"
            console.print(told, soft_wrap=True, highlight=False, markup=False)
        if sae.phase != "Failed":
            console.print(f"SAE     {place}/{sae.name}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"report  {place}/report.html", soft_wrap=True, highlight=False)


def _place(uri: str, store: Path | None) -> str:
    """A URI as people would open it."""
    if uri.startswith("file://"):
        return uri.removeprefix("file://").rstrip("/")
    if store is not None:
        return str(store / uri.removeprefix("s3://").rstrip("/"))
    return uri.rstrip("/")


def run_command_line(arguments: list[str]) -> int:
    """Run the command line; a user's mistake is one line per problem and exit code 2, never a traceback."""
    try:
        app(arguments)
    except SystemExit as end:  # how typer ends, after it has shown what is wrong with the arguments
        return end.code if isinstance(end.code, int) else ExitCode.DONE
    except ManifestError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return ExitCode.INVALID
    except InvalidInput as error:
        print(f"sae-job: {error}", file=sys.stderr)
        return ExitCode.INVALID
    except ClusterUnavailable as error:
        print(f"sae-job: {error}", file=sys.stderr)
        return ExitCode.FAILED
    except StoreError as error:
        print(f"sae-job: {error}; the same command continues", file=sys.stderr)
        return ExitCode.FAILED
    except Stopped as error:
        print(f"sae-job: {error}; the same command continues", file=sys.stderr)
        return ExitCode.STOPPED
    return ExitCode.DONE
