"""When an SAE is given up: `spec.saes[].stopEarly` against the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from sae_operator.api.sae import StopEarly


def reason_to_stop(rule: StopEarly | None, figures: Mapping[str, float | None], *, tokens: int) -> str | None:
    """Why an SAE is trained no further; None where it goes on.

    Args:
        rule: the SAE's, or None.
        figures: of the evaluation: `explained_variance`, `l0`, `dead_fraction`; None where one is not defined.
        tokens: trained on so far.
    """
    if rule is None or tokens < rule.after_tokens:
        return None
    below = (
        ("explained_variance", rule.explained_variance_below, "explainedVarianceBelow"),
        ("l0", rule.l0_below, "l0Below"),
    )
    above = (("l0", rule.l0_above, "l0Above"), ("dead_fraction", rule.dead_fraction_above, "deadFractionAbove"))
    for bounds, word in ((below, "below"), (above, "above")):
        for name, bound, field in bounds:
            value = figures.get(name)
            if bound is None or value is None:
                continue
            if value < bound if word == "below" else value > bound:
                return f"stopped after {tokens} tokens: {name} {value:.4g} is {word} {bound:g} (stopEarly.{field})"
    return None
