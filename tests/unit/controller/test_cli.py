"""The operator's command line refuses what could not work, before anything is started."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sae_operator import cli
from sae_operator.cli import main
from sae_operator.controller import app
from sae_operator.controller.app import Options


def test_a_heartbeat_outside_the_served_namespace_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--namespace=a", "--lease-namespace=b"])
    assert end.value.code == 2
    assert "--lease-namespace must be the namespace of --namespace" in capsys.readouterr().err


def test_help_names_the_ways_to_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "KUBECONFIG" in capsys.readouterr().out


@pytest.fixture
def options_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Options]:
    """What the operator would be started with."""
    started: list[Options] = []
    monkeypatch.setattr(app, "run", started.append)

    def read(*arguments: str) -> Options:
        assert main(arguments) == 0
        return started[-1]

    return read


def test_what_is_allowed_comes_from_flags_or_else_from_the_environment(
    options_of: Callable[..., Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = options_of()
    assert (nothing.allowed_images, nothing.allowed_service_accounts, nothing.allowed_env) == ((), (), ())
    assert not nothing.allow_trust_remote_code
    monkeypatch.setenv(cli.ENV_ALLOWED_IMAGES, "ghcr.io/team/*, *@sha256:*,")
    monkeypatch.setenv(cli.ENV_ALLOWED_SERVICE_ACCOUNTS, "sae-*")
    monkeypatch.setenv(cli.ENV_ALLOWED_ENV, "HF_*,TEAM_*")
    monkeypatch.setenv(cli.ENV_ALLOW_TRUST_REMOTE_CODE, "true")
    given = options_of()
    assert given.allowed_images == ("ghcr.io/team/*", "*@sha256:*")
    assert given.allowed_service_accounts == ("sae-*",)
    assert given.allowed_env == ("HF_*", "TEAM_*")
    assert given.allow_trust_remote_code
    flags = ("--allowed-image=a/*", "--allowed-image=b/*", "--allowed-service-account=c")
    assert options_of(*flags).allowed_images == ("a/*", "b/*")
    assert options_of(*flags).allowed_service_accounts == ("c",)
    assert options_of("--allowed-env=*").allowed_env == ("*",)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--allowed-image=", "must be a pattern"),
        ("--allowed-service-account= ", "must be a pattern"),
        ("--allowed-image=a/*,b/*", "must be one pattern"),
        ("--metrics=0.0.0.0:8082", "must be an address such as http://0.0.0.0:8082/metrics, not 0.0.0.0:8082"),
        ("--metrics=http://0.0.0.0:8082/readyz", "/readyz is the path of readiness"),
    ],
)
def test_wrong_settings_are_refused(argument: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([argument])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("variable", [cli.ENV_ALLOWED_IMAGES, cli.ENV_ALLOWED_SERVICE_ACCOUNTS, cli.ENV_ALLOWED_ENV])
def test_a_list_without_a_pattern_does_not_allow_all(
    variable: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, " , ")
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert f"{variable} must hold patterns" in capsys.readouterr().err
