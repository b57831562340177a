"""The node agent resolves what a pod's manifest says as the kubelet does."""

from __future__ import annotations

import pytest

from tests.testbed.node_agent.environment import (
    ConfigurationError,
    container_environment,
    data_of,
    expand,
    field_value,
)
from tests.testbed.node_agent.volumes import quantity

POD = {
    "metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {"b": "2", "a": "1"}},
    "spec": {"nodeName": "node-0"},
}
OBJECTS = {("configmaps", "settings"): {"COLOR": b"red"}, ("secrets", "keys"): {"KEY": b"made up"}}


def read_data(kind: str, name: str, optional: bool) -> dict[str, bytes] | None:
    if (kind, name) in OBJECTS:
        return OBJECTS[kind, name]
    if optional:
        return None
    raise ConfigurationError(f'{kind} "{name}" not found')


def field(path: str) -> str:
    return field_value(POD, path, pod_ip="127.77.1.1", host_ip="127.0.0.1")


def environment(container: dict[str, object]) -> dict[str, str]:
    return container_environment(container, base={"PATH": "/bin"}, read_data=read_data, field=field)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("64Mi", 64 * 2**20), ("1.5Gi", 3 * 2**29), ("2G", 2 * 10**9), ("100", 100), (5, 5), ("3000m", 3), ("1e3", 1000)],
)
def test_a_quantity_is_a_number_with_a_suffix(text: str | int, expected: int) -> None:
    assert quantity(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("$(A)/x", "1/x"), ("$(UNKNOWN)", "$(UNKNOWN)"), ("$$(A)", "$(A)"), ("$A", "$A"), ("plain", "plain")],
)
def test_references_to_variables_are_expanded(text: str, expected: str) -> None:
    assert expand(text, {"A": "1"}) == expected


def test_later_variables_see_earlier_ones_and_those_of_the_image() -> None:
    variables = environment({"env": [{"name": "A", "value": "$(PATH):/a"}, {"name": "B", "value": "$(A):/b"}]})
    assert variables["B"] == "/bin:/a:/b"


def test_whole_objects_become_variables_and_env_wins_over_them() -> None:
    sources = [{"configMapRef": {"name": "settings"}, "prefix": "MY_"}, {"secretRef": {"name": "keys"}}]
    variables = environment({"envFrom": sources, "env": [{"name": "KEY", "value": "mine"}]})
    assert (variables["MY_COLOR"], variables["KEY"]) == ("red", "mine")


def test_a_missing_key_is_an_error_unless_it_is_optional() -> None:
    reference = {"name": "settings", "key": "SIZE"}
    with pytest.raises(ConfigurationError, match="couldn't find key SIZE in configmap settings"):
        environment({"env": [{"name": "SIZE", "valueFrom": {"configMapKeyRef": reference}}]})
    optional = {"configMapKeyRef": {**reference, "optional": True}}
    assert "SIZE" not in environment({"env": [{"name": "SIZE", "valueFrom": optional}]})


def test_fields_of_the_pod() -> None:
    assert field("status.podIP") == "127.77.1.1"
    assert field("metadata.labels['a']") == "1"
    assert field("metadata.labels") == 'a="1"\nb="2"'
    with pytest.raises(ConfigurationError, match="unsupported fieldPath"):
        field("status.phase")


def test_secrets_are_decoded_and_config_maps_are_text() -> None:
    assert data_of({"data": {"K": "dg=="}}, "secrets") == {"K": b"v"}
    assert data_of({"data": {"K": "v"}, "binaryData": {"B": "dg=="}}, "configmaps") == {"K": b"v", "B": b"v"}
