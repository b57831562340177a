"""What the operator waits for before it begins and before it judges, and which of its arguments it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from sae_operator.cli import main
from sae_operator.controller.app import Operator, Options, missing_definitions
from sae_operator.controller.breaker import CircuitBreaker
from sae_operator.controller.client import ApiError, Page
from sae_operator.controller.queue import Key


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


KEY = Key("SAETrainingJob", "ns", "a")


class Judged(Exception):
    """A look has come so far."""


class Client:
    """Has no defaults, and no pods; while it says so of the defaults, a pod ends."""

    def __init__(self) -> None:
        self.breaker = CircuitBreaker(self._is_back)
        self.operator: Operator | None = None

    async def get(self, path: str) -> dict[str, Any]:
        assert self.operator is not None
        self.operator.store.children("uid-a").pods_due = True
        raise ApiError(404, "NotFound", path)

    async def pages(self, path: str, query: Any) -> AsyncIterator[Page]:
        yield Page([], 2)

    async def _is_back(self) -> bool:
        return True


async def test_nothing_is_judged_before_the_pods_are_listed_that_end_during_a_look() -> None:
    client = Client()
    operator = Operator(Options("image", namespace="ns", lease_namespace="ns"), client=client)  # type: ignore[arg-type]
    client.operator = operator
    meta = {"name": "a", "namespace": "ns", "uid": "uid-a", "resourceVersion": "1", "generation": 1}
    operator.store.put_resource(KEY.kind, {"metadata": meta, "spec": {}, "status": {}})

    async def judge(*_: object) -> None:
        family = operator.store.children("uid-a")
        assert (family.pods_due, family.pods_version) == (False, 2)
        raise Judged

    operator._reconcile = judge  # type: ignore[method-assign]
    with pytest.raises(Judged):
        await operator.process(KEY)
