"""Ways into a cluster: kubeconfig files as kubectl reads them, and what is said when there is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sae_operator.controller.credentials import CredentialsError, load_credentials


def kubeconfig(path: Path, user: dict[str, Any], *, context: str | None = "here", namespace: str | None = None) -> str:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:6443", "certificate-authority": "ca.crt"}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [
            {
                "name": "here",
                "context": {"cluster": "c", "user": "u", **({"namespace": namespace} if namespace else {})},
            }
        ],
        **({"current-context": context} if context else {}),
    }
    path.write_text(json.dumps(document))
    return str(path)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    user = {"client-certificate": "me.crt", "client-key": "me.key"}
    found = load_credentials(kubeconfig(tmp_path / "config", user, namespace="team"))
    assert found.ca_path == str(tmp_path / "ca.crt")
    assert found.certificate_path == str(tmp_path / "me.crt")
    assert found.private_key_path == str(tmp_path / "me.key")
    assert found.namespace == "team"
    assert not found.refreshes


def test_a_token_file_is_read_again_each_time(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("first\n")
    path = kubeconfig(tmp_path / "config", {"tokenFile": "token"})
    assert load_credentials(path).token == "first"
    (tmp_path / "token").write_text("second\n")
    found = load_credentials(path)
    assert found.token == "second"
    assert found.refreshes


def test_a_credential_plugin_is_asked(tmp_path: Path) -> None:
    script = (
        "import json, os; info = json.loads(os.environ['KUBERNETES_EXEC_INFO']);"
        "print(json.dumps({'status': {'token': os.environ['PREFIX'] + info['kind']}}))"
    )
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": sys.executable,
        "args": ["-c", script],
        "env": [{"name": "PREFIX", "value": "token-of-"}],
    }
    found = load_credentials(kubeconfig(tmp_path / "config", {"exec": plugin}))
    assert found.token == "token-of-ExecCredential"
    assert found.refreshes


def test_a_plugin_that_fails_is_named(tmp_path: Path) -> None:
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": sys.executable, "args": ["-c", "exit(3)"]}
    with pytest.raises(CredentialsError, match="plugin"):
        load_credentials(kubeconfig(tmp_path / "config", {"exec": plugin}))


def test_the_first_of_several_files_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kubeconfig(tmp_path / "first", {"token": "one"}, context=None)
    second = kubeconfig(tmp_path / "second", {"token": "two"})
    monkeypatch.setenv("KUBECONFIG", f"{first}:{second}")
    assert load_credentials().token == "one"


@pytest.mark.parametrize("context", [None, "elsewhere"])
def test_a_missing_context_is_told(tmp_path: Path, context: str | None) -> None:
    with pytest.raises(CredentialsError, match="context"):
        load_credentials(kubeconfig(tmp_path / "config", {}, context=context))


def test_no_way_into_a_cluster_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CredentialsError, match="KUBECONFIG"):
        load_credentials()


def test_a_file_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="cannot read kubeconfig"):
        load_credentials(str(tmp_path / "nothing"))


def test_a_file_that_is_no_yaml_is_told_without_a_word_of_it(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("token: [s3cret")
    with pytest.raises(CredentialsError) as caught:
        load_credentials(str(tmp_path / "config"))
    assert "s3cret" not in str(caught.value)


def test_a_token_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="cannot read the token"):
        load_credentials(kubeconfig(tmp_path / "config", {"tokenFile": "nothing"}))
