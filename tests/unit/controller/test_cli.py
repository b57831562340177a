"""The operator's command line refuses what could not work, before anything is started."""

from __future__ import annotations

import pytest

from sae_operator.cli import main


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
