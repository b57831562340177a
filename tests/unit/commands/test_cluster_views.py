"""What `sae-job get`, `watch`, `logs` and `pull` make of resources and pods; no cluster is needed for that."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from urllib3.exceptions import HTTPError

from sae_job.cluster import tables, view
from sae_job.cluster.connection import Cluster, Found, connect, kind_named
from sae_job.cluster.results import Access, download, is_current, open_results, output_location, result_files
from sae_job.commands.logs import newest_pod
from sae_job.commands.pull import _copy
from sae_job.errors import ClusterUnavailable, InvalidInput
from sae_job.storage.base import ObjectInfo, StoreError
from sae_job.storage.file_store import FileStore
from sae_operator.api.resources import ACTIVATION_CACHE, KINDS, SAE_SWEEP, SAE_TRAINING_JOB, Kind

NOW = datetime(2030, 1, 2, 12, 0, tzinfo=UTC)


def found(kind: Kind = SAE_TRAINING_JOB, *, status: dict[str, Any] | None = None, **spec: Any) -> Found:
    metadata = {
        "name": "example",
        "namespace": "team",
        "uid": "u",
        "generation": 3,
        "creationTimestamp": "2030-01-02T09:00:00Z",
    }
    return Found(kind, {"metadata": metadata, "spec": spec, "status": status or {}})


def conditions(**truths: tuple[str, str]) -> list[dict[str, str]]:
    return [{"type": name, "status": status, "message": text} for name, (status, text) in truths.items()]


class TestKinds:
    @pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
    def test_each_name_that_kubectl_takes_is_taken(self, kind: Kind) -> None:
        for word in (kind.kind, kind.singular, kind.plural, *kind.short_names, kind.kind.upper()):
            assert kind_named(word) is kind

    def test_another_word_is_refused_with_those_that_there_are(self) -> None:
        with pytest.raises(InvalidInput, match="no kind is named 'job'; there are actcache, saejob, sweep"):
            kind_named("job")


class TestRows:
    def test_a_row_has_the_columns_of_kubectl_and_what_the_resource_says(self) -> None:
        job = found(
            status={
                "phase": "Running",
                "progress": {"percent": 42, "tokensPerSecond": 12345},
                "summary": {"explainedVariance": "0.850", "l0": "32.0"},
                "conditions": conditions(Ready=("False", "step train runs")),
            }
        )
        cells = dict(
            zip(
                tables.headings(job.kind, namespaces=True, wide=False),
                tables.row(job, NOW, namespaces=True, wide=False),
                strict=True,
            )
        )
        assert cells == {
            "Namespace": "team",
            "Name": "example",
            "Phase": "Running",
            "Progress%": "42",
            "Tokens/s": "12,345",
            "EV": "0.850",
            "L0": "32.0",
            "Age": "3h",
            "Message": "step train runs",
        }

    def test_a_new_resource_has_a_row_of_dashes(self) -> None:
        assert tables.row(found(), NOW, namespaces=False, wide=False) == ["example", *"–––––", "3h", ""]

    def test_a_finding_comes_before_that_the_resource_is_not_ready(self) -> None:
        job = found(
            status={"conditions": conditions(Ready=("False", "waits"), Unschedulable=("True", "no node has a GPU"))}
        )
        assert tables.message(job) == "Unschedulable: no node has a GPU"

    @pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59, "59s"), (60, "1m"), (7200, "2h"), (200_000, "2d")])
    def test_ages_are_told_in_their_largest_unit(self, seconds: int, text: str) -> None:
        since = datetime.fromtimestamp(NOW.timestamp() - seconds, UTC).isoformat()
        assert tables.age(since, NOW) == text

    def test_what_terminals_would_obey_is_taken_out(self) -> None:
        job = found(status={"phase": "Failed", "conditions": conditions(Ready=("False", "a\x1b[31mb\r\nc\x9bd"))})
        assert tables.message(job) == "a [31mb c d"
        assert view.headline(job).endswith("  a [31mb c d")

    def test_in_a_narrow_terminal_only_the_message_gives_way(self) -> None:
        cells = [["Name", "Phase", "Message"], ["a-name-of-forty-letters-as-long-as-can-be", "Running", "x" * 100]]
        name = cells[1][0]
        assert tables.lines(cells, 40)[1] == f"{name}  Running  {'x' * 19}…"
        assert tables.lines(cells, 80)[1] == f"{name}  Running  {'x' * 27}…"
        assert len(tables.lines(cells, 80)[1]) == 80
        assert tables.lines(cells, None) == [f"{'Name':<41}  Phase    Message", f"{name}  Running  {'x' * 100}"]


class TestOutcome:
    def test_done_and_failed_are_about_the_current_spec(self) -> None:
        ready = conditions(Ready=("True", ""), Stalled=("False", ""))
        stalled = conditions(Ready=("False", ""), Stalled=("True", ""))
        assert tables.outcome(found(status={"observedGeneration": 3, "conditions": ready})) == "done"
        assert tables.outcome(found(status={"observedGeneration": 3, "conditions": stalled})) == "failed"
        assert tables.outcome(found(status={"observedGeneration": 2, "conditions": ready})) is None

    def test_a_suspended_resource_has_not_ended(self) -> None:
        paused = conditions(Ready=("False", "suspended"), Reconciling=("False", ""), Stalled=("False", ""))
        assert tables.outcome(found(status={"observedGeneration": 3, "conditions": paused})) is None


class TestView:
    def test_the_headline_tells_progress_in_words(self) -> None:
        progress = {
            "tokens": 420_000,
            "totalTokens": 1_000_000,
            "percent": 42,
            "tokensPerSecond": 12_345,
            "etaSeconds": 4270,
        }
        told = view.headline(found(status={"phase": "Running", "progress": progress}))
        assert told == (
            "saetrainingjob/example  Running  42 %, 420,000 of 1,000,000 tokens, 12,345 tokens/s, 1:11:10 left"
        )

    def test_a_sweep_tells_its_trials(self) -> None:
        trials = {"total": 20, "succeeded": 9, "failed": 1, "stopped": 2, "running": 4}
        told = view.headline(found(SAE_SWEEP, status={"phase": "Running", "trials": trials}))
        assert told == "saesweep/example  Running  12 of 20 trials finished (1 failed, 2 stopped), 4 running"

    def test_figures_that_no_sae_has_take_no_column(self) -> None:
        entries = [{"name": "a", "phase": "Running", "l0": 31.98}, {"name": "b", "explainedVariance": 0.81234}]
        assert view.figures_of(entries, first="SAE") == (
            ["SAE", "phase", "explained variance", "L0"],
            [["a", "Running", "–", "31.98"], ["b", "–", "0.8123", "–"]],
        )

    def test_the_picture_holds_figures_and_what_needs_attention(self) -> None:
        status = {
            "phase": "Queued",
            "saes": [{"name": "k32", "phase": "Running", "explainedVariance": 0.5}],
            "conditions": conditions(ImagePullFailed=("True", "image x cannot be pulled")),
        }
        written = io.StringIO()
        Console(file=written, width=120).print(view.render(found(status=status)))
        assert "k32" in written.getvalue()
        assert "ImagePullFailed: image x cannot be pulled" in written.getvalue()

    def test_the_table_of_the_best_trials_begins_on_a_line_of_its_own(self) -> None:
        best = [{"name": "t-1", "parameters": "dataset=[/x] [bold]", "explainedVariance": 0.5}]
        written = io.StringIO()
        status = {"trials": {"total": 9, "succeeded": 1}, "best": best}
        Console(file=written, width=80).print(view.render(found(SAE_SWEEP, status=status)))
        *_, heading, row = written.getvalue().splitlines()
        assert heading.split() == ["best", "trial", "parameters", "explained", "variance"]
        assert row.split() == ["t-1", "dataset=[/x]", "[bold]", "0.5000"]


class TestWatch:
    """The API server is a list of what its calls come to."""

    @staticmethod
    def watched(answers: list[Any], *, seconds: float = math.inf) -> list[Found | None]:
        time = [0.0]

        def answer(*_: Any, **options: Any) -> Any:
            value = answers.pop(0)
            if isinstance(value, Exception):
                raise value
            if "watch" not in options:
                return value
            lines = b"".join(json.dumps(event).encode() + b"\n" for event in value)
            return SimpleNamespace(stream=lambda **_: [lines], release_conn=lambda: None)

        def pause(passed: float) -> None:
            time[0] += passed

        cluster = Cluster(cast("Any", None), "team")
        cluster._objects = cast("Any", SimpleNamespace(list_namespaced_custom_object=answer))
        states = cluster.watch(found(), seconds=seconds, clock=lambda: time[0], pause=pause)
        return list(itertools.islice(states, 4))

    def test_an_api_server_that_comes_back_is_asked_again(self) -> None:
        body = {"metadata": {"name": "example"}}
        state = {"metadata": {"resourceVersion": "5"}, "items": [body]}
        away, change = HTTPError("refused"), {"type": "MODIFIED", "object": body}
        answers = [state, away, away, state, [{"type": "ERROR", "object": {}}], state, [change]]
        assert [state and state.name for state in self.watched(answers)] == ["example"] * 4
        assert answers == []

    def test_one_that_stays_away_is_told(self) -> None:
        with pytest.raises(ClusterUnavailable, match="does not answer: refused"):
            self.watched([{"metadata": {"resourceVersion": "5"}, "items": []}, *[HTTPError("refused")] * 302])

    def test_what_is_no_api_server_is_told(self) -> None:
        with pytest.raises(ClusterUnavailable, match="what answers is no API server"):
            self.watched(["<html>"], seconds=0)


class TestNames:
    @pytest.mark.parametrize("reference", ["", "saejob/", "..", "saejob/.."])
    def test_what_is_no_name_is_asked_for_nowhere(self, reference: str) -> None:
        with pytest.raises(InvalidInput, match="there is no"):
            Cluster(cast("Any", None), "team").find(reference)


class TestPods:
    @staticmethod
    def pod(name: str, step: str, index: int | None = None) -> dict[str, Any]:
        annotations = {} if index is None else {"batch.kubernetes.io/job-completion-index": str(index)}
        return {"metadata": {"name": name, "labels": {"sae-operator.dev/step": step}, "annotations": annotations}}

    def test_the_newest_pod_of_the_newest_step_is_chosen(self) -> None:
        pods = [self.pod("p", "preflight"), self.pod("t1", "train"), self.pod("t2", "train")]
        chosen = newest_pod(pods, step=None, index=None)
        assert chosen is not None
        assert chosen["metadata"]["name"] == "t2"

    def test_of_pods_that_work_together_the_first_one_is_chosen(self) -> None:
        pods = [self.pod("a0", "train", 0), self.pod("b0", "train", 0), self.pod("a1", "train", 1)]
        chosen = newest_pod(pods, step=None, index=None)
        assert chosen is not None
        assert chosen["metadata"]["name"] == "b0"

    def test_step_and_index_narrow_the_choice(self) -> None:
        pods = [self.pod("c0", "cache", 0), self.pod("c1", "cache", 1), self.pod("f", "finalize")]
        chosen = newest_pod(pods, step="cache", index=1)
        assert chosen is not None
        assert chosen["metadata"]["name"] == "c1"
        assert newest_pod(pods, step="train", index=None) is None


class TestResults:
    def test_a_sweep_has_its_results_in_the_folder_of_its_template(self) -> None:
        output = {"uri": "s3://saes/sweep"}
        assert output_location(found(SAE_SWEEP, template={"output": output})).uri == "s3://saes/sweep"
        assert output_location(found(output=output)).uri == "s3://saes/sweep"

    def test_a_cache_is_left_to_its_own_commands(self) -> None:
        cache = found(ACTIVATION_CACHE, status={"manifestUri": "s3://saes/caches/team/0123/manifest.json"})
        with pytest.raises(InvalidInput, match="`sae-job cache inspect s3://saes/caches/team/0123`"):
            output_location(cache)

    @pytest.mark.parametrize(
        ("output", "defaults", "endpoint", "told"),
        [
            ({"uri": "ftp://x"}, {}, None, "saetrainingjob/example names no place that can be opened: uri: "),
            ({"uri": "s3://saes/x", "newer": 1}, {}, None, "newer: "),
            ({"uri": "s3://saes/x"}, {"secretName": "../x"}, None, "ConfigMap sae-operator-defaults names no place"),
            ({"uri": "s3://saes/x"}, {"endpointUrl": "x"}, None, "ConfigMap sae-operator-defaults names no place"),
            ({"uri": "s3://saes/x"}, {}, "x", "--endpoint-url names no place"),
        ],
    )
    def test_a_place_that_is_none_is_told_on_one_line(
        self, output: dict[str, Any], defaults: dict[str, str], endpoint: str | None, told: str
    ) -> None:
        cluster = SimpleNamespace(config_map=lambda *_: defaults)
        with pytest.raises(InvalidInput, match=re.escape(told)) as caught:
            open_results(cast("Any", cluster), found(output=output), Access(endpoint)).__enter__()
        assert "\n" not in caught.value.message

    def test_working_files_are_left_out_unless_asked_for(self, tmp_path: Path) -> None:
        store = FileStore(tmp_path)
        keys = ["results.json", "k32/cfg.json", "checkpoints/5/state.pt", "activations/a", "0af/checkpoints/x", "0af/b"]
        for key in keys:
            store.put(key, b"x")
        assert [each.key for each in result_files(store)] == ["0af/b", "k32/cfg.json", "results.json"]
        assert len(result_files(store, working=True)) == len(keys)

    def test_a_file_is_copied_whole_and_not_again_until_it_changes(self, tmp_path: Path) -> None:
        store, path = FileStore(tmp_path / "store"), tmp_path / "here" / "a" / "b.json"
        store.put("a/b.json", b"12345")
        (entry,) = store.list()
        assert not is_current(entry, path)
        assert sum(download(store, entry, path)) == 5
        assert path.read_bytes() == b"12345"
        assert is_current(entry, path)
        assert [each.name for each in path.parent.iterdir()] == ["b.json"]
        os.utime(path, (0, 0))
        assert not is_current(entry, path), "what was written again since is copied again"

    @pytest.mark.parametrize("key", ["../outside", "k32/../../outside", "/outside", "link/outside"])
    def test_a_key_that_leads_out_of_the_folder_is_refused(self, tmp_path: Path, key: str) -> None:
        target = tmp_path / "here"
        target.mkdir()
        (target / "link").symlink_to(tmp_path)
        store = SimpleNamespace(uri="s3://b/x", get_range=lambda *_: b"1")
        with pytest.raises(InvalidInput, match=f"s3://b/x/{key} would lie outside"):
            _copy(cast("Any", store), [ObjectInfo(key, 1, "")], target)
        assert not (tmp_path / "outside").exists()

    def test_marks_of_folders_are_no_results(self) -> None:
        store = SimpleNamespace(list=lambda _: [ObjectInfo("k32/", 0, ""), ObjectInfo("", 0, "")])
        assert result_files(cast("Any", store)) == []

    def test_an_object_that_became_shorter_leaves_no_file(self, tmp_path: Path) -> None:
        store, path = FileStore(tmp_path / "store"), tmp_path / "here" / "log.txt"
        store.put("log.txt", b"12345")
        (entry,) = store.list()
        store.put("log.txt", b"123")
        with pytest.raises(StoreError, match=r"log.txt has become shorter"):
            list(download(store, entry, path))
        assert list(path.parent.iterdir()) == []

    def test_a_place_that_cannot_be_written_is_told(self, tmp_path: Path) -> None:
        store = FileStore(tmp_path / "store")
        store.put("a/b", b"1")
        (entry,) = store.list()
        (tmp_path / "a").write_text("no folder")
        with pytest.raises(InvalidInput, match="a/b cannot be written: "):
            list(download(store, entry, tmp_path / "a" / "b"))


@pytest.mark.parametrize("content", ["{ broken: [", "just text", "[]"])
def test_a_broken_kubeconfig_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config").write_text(content)
    with pytest.raises(InvalidInput, match="the kubeconfig cannot be read"):
        connect(kubeconfig=tmp_path / "config", context=None, namespace=None)


def test_a_command_that_is_ended_leaves_no_keys_behind(tmp_path: Path) -> None:
    data = base64.b64encode(b"certificate").decode()
    names = {"cluster": "c", "user": "u"}
    key = base64.b64encode(b"key").decode()
    user = {"client-certificate-data": data, "client-key-data": key}
    content = {
        "current-context": "x",
        "contexts": [{"name": "x", "context": names}],
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": user}],
    }
    config, temporary = tmp_path / "config", tmp_path / "temporary"
    config.write_text(json.dumps(content))
    temporary.mkdir()
    program = (
        "import os, signal, sys; from pathlib import Path; from sae_job.entry import _stop_at_once\n"
        "signal.signal(signal.SIGTERM, _stop_at_once)\n"
        "from sae_job.commands.cluster_options import open_cluster\n"
        f"open_cluster(None, Path({os.fspath(config)!r}), None)\n"
        f"print(len(os.listdir({os.fspath(temporary)!r})), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    environment = {**os.environ, "TMPDIR": os.fspath(temporary)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (143, "2\n"), done.stderr
    assert list(temporary.iterdir()) == []


def test_a_namespace_that_is_no_name_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"'\.\.' is no name of a namespace"):
        connect(kubeconfig=None, context=None, namespace="..")


def test_without_a_kubeconfig_the_fix_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="set KUBECONFIG or give --kubeconfig"):
        connect(kubeconfig=tmp_path / "none", context=None, namespace=None)
