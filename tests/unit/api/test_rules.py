"""Every rule of the models, broken and kept, with the message that the user reads."""

from __future__ import annotations

import pytest

from sae_operator.api.manifest import validate_spec
from sae_operator.api.resources import KINDS
from tests.rule_cases import RULE_CASES, RuleCase
from tests.specs import SPECS, all_models, edited


@pytest.mark.parametrize("case", RULE_CASES, ids=str)
def test_what_breaks_a_rule_is_refused_with_its_message_and_field(case: RuleCase) -> None:
    problems = validate_spec(case.kind, edited(SPECS[case.kind], case.breaks))
    assert isinstance(problems, list)
    assert (case.field, case.message) in {(problem.field, problem.message) for problem in problems}


@pytest.mark.parametrize("case", RULE_CASES, ids=str)
def test_what_keeps_a_rule_is_accepted(case: RuleCase) -> None:
    spec = validate_spec(case.kind, edited(SPECS[case.kind], case.keeps))
    assert isinstance(spec, KINDS[case.kind].spec), spec


def test_each_rule_has_a_case() -> None:
    rules = {rule.message for kind in KINDS.values() for model in all_models(kind.spec) for rule in model.RULES}
    assert rules == {case.message for case in RULE_CASES}


def test_all_broken_rules_are_told_at_once() -> None:
    edits = {"saes.0.architecture": {"type": "standard", "k": 3, "auxK": 4}}
    problems = validate_spec("SAETrainingJob", edited(SPECS["SAETrainingJob"], edits))
    assert [problem.message for problem in problems] == [
        "l1Coefficient is required for types standard and gated",
        "k is only for types topk, batchtopk and matryoshka_batchtopk",
        "auxK is only for types topk, batchtopk and matryoshka_batchtopk",
    ]
