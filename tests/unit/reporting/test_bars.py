"""Progress of a local run, for people: one line per state."""

import io

from rich.console import Console

from sae_job.reporting.bars import describe, step_bar
from sae_operator.api.steps import Progress, SaeProgress

SAES = [
    SaeProgress(name=f"sae-{number}", phase="Running", loss=12.5, l0=31.96, explained_variance=0.7512)
    for number in range(4)
]
STATE = Progress(
    step="train",
    updated_at="2026-01-01T00:00:00Z",
    tokens=25_600,
    total_tokens=156_160,
    tokens_per_second=1234.5,
    eta_seconds=105.8,
    saes=SAES,
)


def test_a_state_is_told_with_tokens_rate_time_left_and_each_saes_figures() -> None:
    assert describe(STATE.model_copy(update={"saes": SAES[:1]})) == (
        "25,600/156,160 tokens  1,234 tokens/s  ETA 1:46  sae-0: loss 12.5 L0 32.0 EV 0.751"
    )


def test_without_a_terminal_a_state_is_one_line_however_long() -> None:
    out = io.StringIO()
    times = iter([0.0, 20.0, 20.0])
    with step_bar("job train", Console(file=out, width=80), lambda: next(times)) as show:
        show(STATE)
    assert out.getvalue() == f"job train: {describe(STATE)}\n"
