"""Progress is told as counts, a rate over a recent window, and the time left at that rate."""

import json
import urllib.error
import urllib.request

import pytest

from sae_job.reporting.endpoint import serve_progress
from sae_job.reporting.progress import ProgressReporter
from sae_operator.api.steps import Progress, SaeProgress


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_rate_and_time_left_follow_from_the_window(clock: Clock) -> None:
    reporter = ProgressReporter("train", clock=clock)
    reporter.update(tokens=0, total_tokens=1000)
    clock.now += 2
    reporter.update(tokens=200)
    assert reporter.state.tokens_per_second == 100.0
    assert reporter.state.eta_seconds == 8.0


def test_tokens_of_an_earlier_attempt_do_not_count_in_the_rate(clock: Clock) -> None:
    reporter = ProgressReporter("train", clock=clock)
    reporter.update(tokens=500, total_tokens=1000)
    clock.now += 1
    reporter.update(tokens=510)
    assert reporter.state.tokens_per_second == 10.0


def test_the_rate_forgets_what_is_older_than_the_window(clock: Clock) -> None:
    reporter = ProgressReporter("train", clock=clock)
    reporter.update(tokens=0, total_tokens=10**6)
    for second in range(1, 101):
        clock.now += 1
        reporter.update(tokens=1000 * min(second, 50) + 10 * max(0, second - 50))
    assert reporter.state.tokens_per_second == pytest.approx(10.0)


def test_listeners_see_each_state() -> None:
    seen: list[Progress] = []
    reporter = ProgressReporter("cache", listeners=(seen.append,))
    reporter.update(tokens=1)
    reporter.update(tokens=2)
    assert [state.tokens for state in seen] == [1, 2]


def test_progress_and_metrics_are_served(clock: Clock) -> None:
    reporter = ProgressReporter("train", clock=clock)
    reporter.update(tokens=5, total_tokens=10, saes=[SaeProgress(name="k32", l0=31.5)], checkpoint_tokens=4)
    with serve_progress(reporter, "127.0.0.1", 0) as address:
        with urllib.request.urlopen(f"{address}/progress", timeout=5) as response:
            body = json.load(response)
        with urllib.request.urlopen(f"{address}/metrics", timeout=5) as response:
            metrics = response.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/other", timeout=5)
    assert body["tokens"] == 5
    assert body["totalTokens"] == 10
    assert body["saes"][0]["l0"] == 31.5
    assert body["checkpointTime"] == "1970-01-12T13:46:40Z"
    assert 'sae_job_tokens{step="train"} 5.0' in metrics
    assert 'sae_job_sae_l0{sae="k32"} 31.5' in metrics


def test_a_trainings_metrics_tell_each_sae_and_the_age_of_its_checkpoint(clock: Clock) -> None:
    reporter = ProgressReporter("train", clock=clock)
    saes = [
        SaeProgress(name="a", loss=2.0, explained_variance=0.5, dead_features=3, learning_rate=1e-3),
        SaeProgress(name="b", phase="Stopped", kl_divergence_score=0.9),
    ]
    reporter.update(tokens=5, total_tokens=10, saes=saes, checkpoint_tokens=4)
    clock.now += 90
    with (
        serve_progress(reporter, "127.0.0.1", 0) as address,
        urllib.request.urlopen(f"{address}/metrics", timeout=5) as response,
    ):
        metrics = response.read().decode().splitlines()
    for line in (
        'sae_job_sae_loss{sae="a"} 2.0',
        'sae_job_sae_explained_variance{sae="a"} 0.5',
        'sae_job_sae_dead_features{sae="a"} 3.0',
        'sae_job_sae_learning_rate{sae="a"} 0.001',
        'sae_job_sae_kl_divergence_score{sae="b"} 0.9',
        'sae_job_sae_running{sae="a"} 1.0',
        'sae_job_sae_running{sae="b"} 0.0',
        'sae_job_checkpoint_age_seconds{step="train"} 90.0',
    ):
        assert line in metrics


def test_without_a_checkpoint_there_is_no_age(clock: Clock) -> None:
    assert ProgressReporter("train", clock=clock).checkpoint_age is None
