"""Our reading of kstatus's rules against the cases that its library publishes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.gitops.kstatus import Kstatus, kstatus


def custom_resource(
    *conditions: tuple[str, str], generation: int = 1, observed: int | None = None, **metadata: Any
) -> dict[str, Any]:
    status: dict[str, Any] = {} if observed is None else {"observedGeneration": observed}
    if conditions:
        status["conditions"] = [{"type": kind, "status": truth} for kind, truth in conditions]
    resource = {"metadata": {"name": "test", "generation": generation, **metadata}}
    return {**resource, "status": status} if status else resource


@pytest.mark.parametrize(
    ("resource", "expected"),
    [
        # The library's own cases of custom resources.
        pytest.param(custom_resource(), "Current", id="no status"),
        pytest.param(custom_resource(generation=2, observed=1), "InProgress", id="generation not observed"),
        pytest.param(custom_resource(("Ready", "True")), "Current", id="ready"),
        pytest.param(custom_resource(("Ready", "False"), observed=1), "InProgress", id="not ready"),
        pytest.param(custom_resource(("SomeCondition", "False")), "Current", id="no known condition"),
        # What its README says of the standard conditions and of Ready.
        pytest.param(custom_resource(("Reconciling", "True"), observed=1), "InProgress", id="reconciling"),
        pytest.param(custom_resource(("Stalled", "True"), observed=1), "Failed", id="stalled"),
        pytest.param(custom_resource(("Ready", "Unknown"), observed=1), "InProgress", id="ready unknown"),
        pytest.param(
            custom_resource(("Reconciling", "False"), ("Stalled", "False"), observed=1), "Current", id="neither"
        ),
        # What its code does where several things hold at once.
        pytest.param(
            custom_resource(("Ready", "True"), ("Stalled", "True"), observed=1), "Failed", id="stalled before ready"
        ),
        pytest.param(
            custom_resource(("Ready", "True"), ("Reconciling", "True"), observed=1),
            "InProgress",
            id="reconciling before ready",
        ),
        pytest.param(
            custom_resource(("Stalled", "True"), ("Reconciling", "True"), observed=1), "Failed", id="first in the list"
        ),
        pytest.param(
            custom_resource(("Reconciling", "True"), ("Stalled", "True"), observed=1),
            "InProgress",
            id="first in the list, the other way round",
        ),
        pytest.param(
            custom_resource(("Stalled", "True"), generation=2, observed=1), "InProgress", id="generation before stalled"
        ),
        pytest.param(custom_resource(("Ready", "True"), observed=-1), "InProgress", id="never seen by a controller"),
        pytest.param(
            custom_resource(("Stalled", "True"), generation=2, deletionTimestamp="2026-01-01T00:00:00Z"),
            "Terminating",
            id="deletion before all else",
        ),
    ],
)
def test_a_custom_resource_has_the_status_that_the_library_computes(
    resource: dict[str, Any], expected: Kstatus
) -> None:
    assert kstatus(resource) == expected
