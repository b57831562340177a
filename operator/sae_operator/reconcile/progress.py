"""Live progress: from what each pod says to what the status tells, written no more often than it needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from sae_operator.api.base import MAX_COUNT
from sae_operator.api.status import CheckpointStatus, ProgressStatus, SaeStatus, SummaryStatus
from sae_operator.api.steps import ExitCode, Progress, SaeProgress
from sae_operator.reconcile.conditions import rfc3339
from sae_operator.reconcile.observed import PodFacts
from sae_operator.reconcile.projection import parse_time


def reports(pods: Sequence[PodFacts], progress: Mapping[str, Progress]) -> list[tuple[PodFacts, Progress]]:
    """What was last heard of each pod: its progress, and of one that has ended what its termination message adds."""
    heard = ((pod, _heard(pod, progress.get(pod.name))) for pod in pods)
    return [(pod, said) for pod, said in heard if said is not None]


def _heard(pod: PodFacts, said: Progress | None) -> Progress | None:
    result, ended = pod.result, pod.finish_time
    if result is None or ended is None:
        return said
    told: dict[str, object] = {}
    if result.exit_code == ExitCode.DONE and result.tokens is not None:
        told |= {"tokens": result.tokens, "total_tokens": result.tokens, "shards_complete": result.shards_complete}
    if result.checkpoint_tokens is not None:
        told |= {"checkpoint_tokens": result.checkpoint_tokens, "checkpoint_time": rfc3339(ended)}
    if not told:
        return said
    base = said or Progress(step=pod.step, updated_at=rfc3339(ended))
    return base.model_copy(update=told)


def latest_by_index(pods: Sequence[PodFacts], progress: Mapping[str, Progress]) -> dict[int, Progress]:
    """What was last heard of each completion index (0 for a Job that has none).

    A retried index has several pods; the one that said something last counts.
    """
    latest: dict[int, Progress] = {}
    for pod, said in reports(pods, progress):
        index = pod.index or 0
        if index not in latest or latest[index].updated_at <= said.updated_at:
            latest[index] = said
    return latest


def merge_progress(
    pods: Sequence[PodFacts],
    progress: Mapping[str, Progress],
    previous: ProgressStatus | None,
    *,
    total_tokens: int | None,
    at_least: int = 0,
    now: datetime,
) -> ProgressStatus:
    """Progress of a step over all its pods.

    Args:
        pods: pods of the step's Job.
        progress: what they said.
        previous: what the status says; kept as it is when nothing has changed, so that nothing is written.
        total_tokens: tokens of the whole step; the sum of what the pods say when None.
        at_least: tokens that are done whatever the pods say.
        now: becomes `updatedAt` when something has changed.
    """
    latest = latest_by_index(pods, progress)
    if not latest and previous is not None:
        return previous
    running = {pod.index or 0 for pod in pods if pod.running}
    tokens = max(at_least, sum(said.tokens for said in latest.values()))
    total = total_tokens if total_tokens is not None else sum(said.total_tokens for said in latest.values())
    rate = sum(said.tokens_per_second for index, said in latest.items() if index in running)
    merged = _status(min(tokens, total) if total else tokens, total or None, rate)
    if previous is not None and merged == previous.model_copy(update={"updated_at": None}):
        return previous
    return merged.model_copy(update={"updated_at": rfc3339(now)})


def finished_progress(tokens: int | None, tokens_per_second: float | None, now: datetime) -> ProgressStatus:
    """Progress of what is done."""
    return ProgressStatus(
        tokens=tokens,
        total_tokens=tokens,
        percent=100,
        tokens_per_second=_whole(tokens_per_second) if tokens_per_second else None,
        updated_at=rfc3339(now),
    )


def _status(tokens: int, total: int | None, rate: float) -> ProgressStatus:
    left = total - tokens if total is not None else None
    return ProgressStatus(
        tokens=tokens,
        total_tokens=total,
        # Rounded down: 100 % is for what is done.
        percent=min(100, 100 * tokens // total) if total else 0,
        tokens_per_second=_whole(rate),
        eta_seconds=round(left / rate) if rate >= 1 and left is not None else None,
    )


def _whole(rate: float) -> int:
    """A rate as a status holds it, whatever a pod says."""
    return round(min(rate, MAX_COUNT))


def merge_saes(reported: Sequence[SaeProgress], previous: Sequence[SaeStatus] | None) -> list[SaeStatus] | None:
    """Figures of each SAE; a figure that is not told this time keeps its last value."""
    before = {sae.name: sae for sae in previous or ()}
    merged: list[SaeStatus] = []
    for sae in reported:
        known = before.get(sae.name)
        said = SaeStatus.model_validate(
            sae.model_dump(exclude_none=True, exclude={"loss", "dead_features", "learning_rate"})
        )
        merged.append(known.model_copy(update=said.model_dump(exclude_none=True)) if known is not None else said)
    return merged or (list(previous) if previous else None)


def summarize(saes: Sequence[SaeStatus] | None) -> SummaryStatus | None:
    """Figures of the SAE with the highest explained variance, as text for the columns of `kubectl get`."""
    measured = [sae for sae in saes or () if sae.explained_variance is not None and sae.phase != "Failed"]
    if not measured:
        return None
    best = max(measured, key=lambda sae: sae.explained_variance or 0.0)
    return SummaryStatus(
        sae=best.name,
        explained_variance=f"{best.explained_variance:.3f}",
        l0=f"{best.l0:.1f}" if best.l0 is not None else None,
    )


def merge_checkpoint(
    reported: Iterable[Progress], previous: CheckpointStatus | None, output_uri: str
) -> CheckpointStatus | None:
    """The furthest checkpoint. Its time is that of the first report of its tokens: restoring it is no progress."""
    newest = previous
    for said in reported:
        tokens = said.checkpoint_tokens
        if tokens is None or (newest is not None and newest.tokens is not None and tokens <= newest.tokens):
            continue
        newest = CheckpointStatus(
            tokens=tokens, uri=f"{output_uri.rstrip('/')}/checkpoints/{tokens}/", time=said.checkpoint_time
        )
    return newest


def is_too_early(previous: ProgressStatus | None, now: datetime, interval_seconds: float) -> bool:
    """Whether live figures were written less than an interval ago."""
    written = parse_time(previous.updated_at) if previous is not None else None
    # What was written later than now was written before the clock was put back.
    return written is not None and 0 <= (now - written).total_seconds() < interval_seconds
