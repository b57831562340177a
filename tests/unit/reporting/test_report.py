"""The report tells results, curves, densities, configuration and provenance in one self-contained page."""

import re

import pytest

from sae_job.reporting.report import render_report


@pytest.fixture
def page() -> str:
    results = {
        "name": "job",
        "tokens": 1_000,
        "tokens_per_second": 512.0,
        "saes": [
            {
                "name": "k32",
                "phase": "Succeeded",
                "explained_variance": 0.8123,
                "explained_variance_at_10_percent": 0.61,
                "l0": 32.0,
                "mse": 12.5,
                "ce_loss_score": None,
                "dead_fraction": 0.25,
            },
            {"name": "k64", "phase": "Failed", "message": "loss is NaN at step 3 <lower learningRate>"},
        ],
        "provenance": {"cacheIdentity": "0123"},
    }
    metrics = [
        {"step": step, "tokens": step * 100, "sae": "k32", "loss": 1.0 / step, "learning_rate": 1e-3}
        for step in range(1, 5)
    ] + [{"step": 4, "tokens": 400, "sae": "k32", "evaluation": {"explained_variance": 0.8, "l0": 32.0}}]
    return render_report(results, metrics, {"k32": [-1.0, -3.0, -10.0]}, {"training": {"tokens": 1000}})


def test_both_explained_variances_stand_in_the_table(page: str) -> None:
    assert "0.8123" in page
    assert "0.6100" in page


def test_a_failed_sae_is_told_with_its_message_escaped(page: str) -> None:
    assert "k64: failed. loss is NaN at step 3 &lt;lower learningRate&gt;" in page


def test_a_metric_that_was_not_asked_for_has_no_column(page: str) -> None:
    assert "CE-loss score" not in page


def test_curves_and_density_are_drawn_inside_the_page(page: str) -> None:
    assert page.count("<svg") == 5  # loss, explained variance, L0, learning rate, density


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    assert not re.search(r'(?:src|href)="https?://', page)
    assert "<script" not in page


def test_the_same_results_give_the_same_page(page: str) -> None:
    assert "2026-" not in page


def test_configuration_and_provenance_are_shown(page: str) -> None:
    assert "&quot;cacheIdentity&quot;: &quot;0123&quot;" in page
    assert "&quot;tokens&quot;: 1000" in page


def test_what_only_some_jobs_have_is_drawn_where_it_is() -> None:
    results = {
        "name": "job",
        "tokens": 1_000,
        "saes": [
            {"name": "jump", "phase": "Succeeded", "kl_divergence_score": 0.9321, "l2_ratio": 0.9512},
            {"name": "lost", "phase": "Stopped", "tokens": 500, "message": "l0 900 is above 400"},
        ],
    }
    metrics = [
        {"step": 1, "tokens": 100, "sae": "jump", "loss": 1.0, "coefficient": 0.1, "learning_rate": 1e-3},
        {"step": 1, "tokens": 100, "sae": "jump", "model_evaluation": {"kl_divergence_score": 0.9}},
        {"step": 1, "tokens": 100, "sae": "jump", "window": {"mean_log10_feature_sparsity": -3.0}},
    ]
    page = render_report(results, metrics, {}, {}, thresholds={"jump": [0.1, 0.2, 0.2]})
    assert page.count("<svg") == 5  # loss, KL score, coefficient, learning rate, thresholds
    assert "0.9321" in page
    assert "0.9512" in page
    assert '<span class="stopped">lost: stopped after 500 tokens. l0 900 is above 400</span>' in page


def test_thresholds_that_are_all_alike_can_be_drawn() -> None:
    results = {"name": "job", "tokens": 1, "saes": [{"name": "jump"}]}
    assert "<svg" in render_report(results, [], {}, {}, thresholds={"jump": [0.1, 0.1]})
