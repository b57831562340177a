"""What the operator waits for before it begins, and which of its arguments it refuses."""

from __future__ import annotations

import pytest

from sae_operator.cli import main
from sae_operator.controller.app import missing_definitions


def test_it_waits_until_all_its_kinds_are_served() -> None:
    served = {"resources": [{"name": "activationcaches"}, {"name": "activationcaches/status"}]}
    assert missing_definitions({}) == "activationcaches, saetrainingjobs, saesweeps"
    assert missing_definitions(served) == "saetrainingjobs, saesweeps"
    served["resources"] += [{"name": "saetrainingjobs"}, {"name": "saesweeps"}]
    assert missing_definitions(served) == ""


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_times_are_above_zero(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([f"--poll-seconds={value}"])
    assert ended.value.code == 2
    assert f"must be a number of seconds above 0, not {value}" in capsys.readouterr().err
