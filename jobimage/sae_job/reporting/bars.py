"""Progress bars of a local run: one line per step, with the figures that people watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from sae_operator.api.steps import Progress as StepProgress
from sae_operator.api.steps import SaeProgress

# Without a terminal, a line of plain text now and then takes the bar's place.
_PLAIN_EVERY_SECONDS = 15.0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _sae_figures(sae: SaeProgress) -> str:
    if sae.phase in ("Failed", "Stopped"):
        return f"{sae.name} {sae.phase.lower()}"
    figures = [
        f"{label} {value:{form}}"
        for label, value, form in (
            ("loss", sae.loss, ".4g"),
            ("L0", sae.l0, ".1f"),
            ("EV", sae.explained_variance, ".3f"),
        )
        if value is not None
    ]
    return f"{sae.name}: {' '.join(figures)}" if figures else ""


def describe(state: StepProgress) -> str:
    """Tokens, rate, time left and the SAEs' figures in one line."""
    parts = [f"{state.tokens:,}/{state.total_tokens:,} tokens"] if state.total_tokens else []
    if state.tokens_per_second:
        parts.append(f"{state.tokens_per_second:,.0f} tokens/s")
    if state.eta_seconds is not None and state.tokens < state.total_tokens:
        parts.append(f"ETA {_duration(state.eta_seconds)}")
    parts += [figures for sae in state.saes if (figures := _sae_figures(sae))]
    return "  ".join(parts)


@contextmanager
def step_bar(title: str, console: Console, clock: Callable[[], float]) -> Iterator[Callable[[StepProgress], None]]:
    """Show one step's progress while the block runs; gives the function to call with each new state."""
    if not console.is_terminal:
        yield _plain_lines(title, console, clock)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None, figures="")

        def show(state: StepProgress) -> None:
            progress.update(task, total=state.total_tokens or None, completed=state.tokens, figures=describe(state))

        yield show
        total = progress.tasks[0].total
        progress.update(task, total=total or 1, completed=total or 1)


def _plain_lines(title: str, console: Console, clock: Callable[[], float]) -> Callable[[StepProgress], None]:
    last = clock()

    def show(state: StepProgress) -> None:
        nonlocal last
        if clock() - last >= _PLAIN_EVERY_SECONDS:
            last = clock()
            # One line whatever its length: logs have no width.
            console.print(f"{title}: {describe(state)}", highlight=False, soft_wrap=True)

    return show
