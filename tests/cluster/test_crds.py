"""The custom resources on a real API server: it accepts and refuses what local validation does, in the same words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sae_operator.api.base import API_VERSION, MAX_NAME_LENGTH, NAME_LABEL_MESSAGE, NAME_LENGTH_MESSAGE
from sae_operator.api.manifest import load_manifests, read_yaml, validate_manifest, validate_spec
from sae_operator.api.resources import ACTIVATION_CACHE, KINDS, SAE_SWEEP, SAE_TRAINING_JOB
from tests.example_files import FILES
from tests.rule_cases import RULE_CASES, RuleCase
from tests.specs import REMOVED, SPECS, Edits, all_models, edited, live_activations, manifest
from tests.testbed.control_plane import ControlPlane, KubectlError

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("crds")]

CACHE, JOB, SWEEP = ACTIVATION_CACHE.kind, SAE_TRAINING_JOB.kind, SAE_SWEEP.kind


@dataclass(frozen=True)
class Answer:
    """What the API server said to a write.

    Attributes:
        code: HTTP status code.
        body: the resource, or a `Status`.
    """

    code: int
    body: dict[str, Any]

    @property
    def causes(self) -> set[tuple[str, str]]:
        """Field and message of each thing that is wrong; values that the server puts before a message left out."""
        causes = self.body.get("details", {}).get("causes", [])
        return {(cause["field"], cause["message"].rsplit("Invalid value: ", 1)[-1]) for cause in causes}


class Resources:
    """Writes resources of one namespace with strict field validation, as kubectl does."""

    def __init__(self, control_plane: ControlPlane, namespace: str) -> None:
        self.control_plane = control_plane
        self.namespace = namespace
        self.created = 0

    def create(self, resource: dict[str, Any], *, dry_run: bool = False) -> Answer:
        """Create a resource; unless it is a dry run, under a name that is new."""
        if not dry_run:
            self.created += 1
            resource = {**resource, "metadata": {"name": f"example-{self.created}"}}
        return self._write("POST", resource, "", dry_run)

    def replace(self, resource: dict[str, Any]) -> Answer:
        return self._write("PUT", resource, f"/{resource['metadata']['name']}", False)

    def _write(self, method: str, resource: dict[str, Any], name: str, dry_run: bool) -> Answer:
        plural = KINDS[resource["kind"]].plural
        query = "?fieldValidation=Strict" + ("&dryRun=All" if dry_run else "")
        path = f"/apis/{API_VERSION}/namespaces/{self.namespace}/{plural}{name}{query}"
        code, body = self.control_plane.request(method, path, resource)
        return Answer(code, json.loads(body))


@pytest.fixture(scope="module")
def resources(control_plane: ControlPlane) -> Iterator[Resources]:
    """One namespace for all tests that need nothing but the API server. It goes with them: an operator of later tests
    may serve all namespaces."""
    name = "custom-resources"
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    code, body = control_plane.request("POST", "/api/v1/namespaces", namespace)
    assert code == 201, body
    yield Resources(control_plane, name)
    control_plane.request("DELETE", f"/api/v1/namespaces/{name}")


def test_all_kinds_are_served_under_all_their_names(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.apply({**manifest(CACHE), "metadata": {"name": "c", "namespace": namespace}})
    control_plane.apply({**manifest(JOB), "metadata": {"name": "j", "namespace": namespace}})
    control_plane.apply({**manifest(SWEEP), "metadata": {"name": "s", "namespace": namespace}})
    cache, job = "activationcache.sae-operator.dev/c", "saetrainingjob.sae-operator.dev/j"
    sweep = "saesweep.sae-operator.dev/s"
    names = {key: [cache] for key in ("actcache", "actcaches", "activationcache")}
    names |= {key: [job] for key in ("saejob", "saejobs", "saetrainingjob")}
    names |= {key: [sweep] for key in ("sweep", "sweeps", "saesweep", "saesweeps")}
    for word, expected in (names | {"sae": [cache, sweep, job]}).items():
        assert control_plane.kubectl("get", word, "-n", namespace, "-o", "name").split() == expected


def test_the_columns_of_kubectl_get(control_plane: ControlPlane, namespace: str) -> None:
    job = manifest(JOB)
    control_plane.apply({**job, "metadata": {"name": "j", "namespace": namespace}})
    status = {
        "phase": "Running",
        "progress": {"percent": 42, "tokensPerSecond": 12345},
        "summary": {"explainedVariance": "0.8500", "l0": "32.00"},
    }
    patch = json.dumps({"status": status})
    control_plane.kubectl("patch", "saejob", "j", "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)
    header, row = control_plane.kubectl("get", "saejob", "-n", namespace).splitlines()
    assert header.split() == ["NAME", "PHASE", "PROGRESS%", "TOKENS/S", "EV", "L0", "AGE"]
    assert row.split()[:-1] == ["j", "Running", "42", "12345", "0.8500", "32.00"]
    assert "s3://saes/out" in control_plane.kubectl("get", "saejob", "-n", namespace, "-o", "wide")
    header = control_plane.kubectl("get", "actcache", "-n", namespace, "--ignore-not-found", "-o", "wide")
    assert header == ""


def test_whoever_runs_a_shared_cache_again_replaces_its_run_settings_as_a_whole(
    control_plane: ControlPlane, namespace: str
) -> None:
    """Owners apply the cache as managers of their own. What one leaves out must not stay because of another."""
    wrong = {"image": "no/such:1", "nodeSelector": {"gpu": "none"}, "backoffLimit": 1}
    cache = manifest(CACHE)
    made = {**cache, "metadata": {"name": "c", "namespace": namespace}, "spec": {**cache["spec"], "run": wrong}}
    corrected = {**made, "spec": {**made["spec"], "run": {"backoffLimit": 2}, "retry": 1}}
    for manager, wanted in (("first", made), ("second", made), ("first", corrected)):
        arguments = ("--server-side", "--force-conflicts", f"--field-manager={manager}")
        control_plane.kubectl("apply", *arguments, "-f", "-", input=json.dumps(wanted))
    there = json.loads(control_plane.kubectl("get", "actcache", "c", "-n", namespace, "-o", "json"))["spec"]
    assert (there["retry"], there["run"]["backoffLimit"]) == (1, 2)
    assert "image" not in there["run"]
    assert not there["run"].get("nodeSelector")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_examples_are_accepted_and_mean_the_same_as_locally(
    control_plane: ControlPlane, namespace: str, path: Path
) -> None:
    control_plane.kubectl("apply", "-n", namespace, "-f", path)
    for resource in load_manifests(path):
        stored = control_plane.get(resource.kind.singular, resource.name, "-n", namespace)
        assert validate_spec(resource.kind, stored["spec"]) == resource.spec


class TestRules:
    @pytest.mark.parametrize("case", RULE_CASES, ids=str)
    def test_what_breaks_a_rule_is_refused_in_the_words_of_local_validation(
        self, resources: Resources, case: RuleCase
    ) -> None:
        answer = resources.create(manifest(case.kind, case.breaks), dry_run=True)
        assert answer.code == 422, answer.body
        local = validate_spec(case.kind, edited(SPECS[case.kind], case.breaks))
        assert answer.causes == {(problem.field, problem.message) for problem in local}
        assert (case.field, case.message) in answer.causes

    @pytest.mark.parametrize("case", RULE_CASES, ids=str)
    def test_what_keeps_a_rule_is_accepted(self, resources: Resources, case: RuleCase) -> None:
        answer = resources.create(manifest(case.kind, case.keeps), dry_run=True)
        assert answer.code == 201, answer.body

    @pytest.mark.parametrize(
        ("name", "message"),
        [("a" * (MAX_NAME_LENGTH + 1), NAME_LENGTH_MESSAGE), ("a.b", NAME_LABEL_MESSAGE)],
        ids=["long", "dotted"],
    )
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_name_whose_children_would_not_fit_is_refused(
        self, resources: Resources, kind: str, name: str, message: str
    ) -> None:
        answer = resources.create(manifest(kind, name=name), dry_run=True)
        assert answer.code == 422
        assert {told for _, told in answer.causes} == {message}
        (problem,) = _problems(manifest(kind, name=name))
        assert problem.message == message
        assert resources.create(manifest(kind, name="a" * MAX_NAME_LENGTH), dry_run=True).code == 201

    def test_a_resource_as_large_as_the_bounds_allow_stays_within_the_cost_of_rules(self, resources: Resources) -> None:
        hooks = [{"name": "h" * 256, "headIndex": 4000 + index} for index in range(16)]
        saes = [
            {
                "name": f"{'s' * 60}{index:03d}",
                "hook": f"{'h' * 256}:{4000 + index}",
                "architecture": {"type": "topk", "k": 5},
            }
            for index in range(16)
        ]
        labels = {f"{'k' * 200}{index}": "v" for index in range(32)}
        run = {
            "podLabels": labels,
            "podAnnotations": labels,
            "nodeSelector": labels,
            "env": [{"name": f"{'V' * 120}{index}", "value": "x" * 1024} for index in range(32)],
            "tolerations": [{"key": f"key{index}", "operator": "Exists"} for index in range(16)],
            "volumes": [
                {"claimName": f"{'c' * 250}{index}", "mountPath": f"/{'d' * 250}{index}"} for index in range(8)
            ],
        }
        long = {"saes": saes, "run": run, "output.uri": "s3://saes/" + "o/" * 500}
        cached = {"activations.cache.hooks": hooks, "activations.cache.run": run}
        for edits in (cached, {"activations": live_activations({"hooks": hooks})}):
            created = resources.create(manifest(JOB, {**long, **edits}))
            assert created.code == 201, created.body
            replaced = resources.replace({**created.body, "spec": edited(created.body["spec"], {"retry": 1})})
            assert replaced.code == 200, replaced.body
        parameters = [{"path": f"saes[{i}].{'a' * 180}", "values": ["v" * 100] * 64} for i in range(16)]
        template = edited(SPECS[JOB], {**long, **cached})
        created = resources.create(manifest(SWEEP, {"template": template, "space.parameters": parameters}))
        assert created.code == 201, created.body
        replaced = resources.replace({**created.body, "spec": edited(created.body["spec"], {"retry": 1})})
        assert replaced.code == 200, replaced.body


def _problems(resource: dict[str, Any]) -> list[Any]:
    problems = validate_manifest(resource)
    assert isinstance(problems, list)
    return problems


class TestShape:
    def test_an_unknown_field_is_refused_with_its_path(self, control_plane: ControlPlane, namespace: str) -> None:
        text = json.dumps(manifest(JOB, {"training.learningrate": 1}))
        with pytest.raises(KubectlError, match=r'unknown field "spec\.training\.learningrate"'):
            control_plane.kubectl("apply", "-n", namespace, "-f", "-", input=text)

    @pytest.mark.parametrize(
        ("kind", "edits", "path"),
        [
            (CACHE, {"model.loader": "nnsight"}, "spec.model.loader"),
            (CACHE, {"storage.dtype": "int4"}, "spec.storage.dtype"),
            (CACHE, {"sampling.separators.beginContext": "<s>"}, "spec.sampling.separators.beginContext"),
            (CACHE, {"hooks.0.headIndex": 4096}, "spec.hooks[0].headIndex"),
            (JOB, {"saes.0.hook": "z:"}, "spec.saes[0].hook"),
            (JOB, {"saes.0.architecture": {"type": "vanilla"}}, "spec.saes[0].architecture.type"),
            (CACHE, {"tokens": REMOVED}, "spec.tokens"),
            (CACHE, {"tokens": 0}, "spec.tokens"),
            (CACHE, {"tokens": 2.5}, "spec.tokens"),
            (CACHE, {"tokens": "5"}, "spec.tokens"),
            (CACHE, {"hooks": []}, "spec.hooks"),
            (CACHE, {"parallelism": 1025}, "spec.parallelism"),
            (CACHE, {"storage.uri": "gs://a"}, "spec.storage.uri"),
            (CACHE, {"run.resources.limits": {"cpu": 0.5}}, "spec.run.resources.limits.cpu"),
            (CACHE, {"run.resources.limits": {"cpu": "half"}}, "spec.run.resources.limits.cpu"),
            (CACHE, {"run.nodeSelector": {"pool": "a b"}}, "spec.run.nodeSelector.pool"),
            (JOB, {"training.adamBeta1": 1}, "spec.training.adamBeta1"),
            (JOB, {"training.learningRate": 0}, "spec.training.learningRate"),
            (JOB, {"saes": [SPECS[JOB]["saes"][0]] * 17}, "spec.saes"),
        ],
    )
    def test_both_refuse_the_same_field(self, resources: Resources, kind: str, edits: Edits, path: str) -> None:
        answer = resources.create(manifest(kind, edits), dry_run=True)
        assert answer.code == 422, answer.body
        assert path in {where for where, _ in answer.causes}
        assert {problem.field for problem in _problems(manifest(kind, edits))} == {path}

    @pytest.mark.parametrize("number", ["3e8", "300000000", "3.0e8"])
    def test_a_number_means_the_same_in_the_cluster_and_locally(
        self, control_plane: ControlPlane, namespace: str, number: str
    ) -> None:
        text = json.dumps(manifest(JOB, {"training": {"learningRate": "RATE", "tokens": "TOKENS"}}))
        text = text.replace('"RATE"', "3e-4").replace('"TOKENS"', number)
        control_plane.kubectl("apply", "-n", namespace, "-f", "-", input=text)
        stored = control_plane.get("saejob", "example", "-n", namespace)["spec"]
        (document,) = read_yaml(text)
        spec = validate_spec(JOB, document["spec"])
        assert validate_spec(JOB, stored) == spec
        assert (spec.training.tokens, spec.training.learning_rate) == (300_000_000, 3e-4)

    def test_defaults_are_filled_in_at_every_depth(self, resources: Resources) -> None:
        for kind in KINDS:
            created = resources.create(manifest(kind))
            assert created.code == 201
            assert created.body["spec"] == validate_spec(kind, SPECS[kind]).to_manifest()

    def test_a_field_left_empty_gets_its_default(self, resources: Resources) -> None:
        created = resources.create(manifest(CACHE, {"seed": None, "model.revision": None, "run": None}))
        assert created.code == 201
        assert created.body["spec"] == validate_spec(CACHE, SPECS[CACHE]).to_manifest()

    def test_a_new_resource_is_never_taken_for_current(self, resources: Resources) -> None:
        for kind in KINDS:
            created = resources.create({**manifest(kind), "status": {"observedGeneration": 1, "phase": "Failed"}})
            assert created.body["status"] == {"observedGeneration": -1}

    def test_explain_describes_the_sources_of_activations(self, control_plane: ControlPlane) -> None:
        told = " ".join(control_plane.kubectl("explain", "saetrainingjob.spec.activations").split())
        assert "Where activations come from: exactly one of `cacheRef`, `cache`, `uri` and `live`." in told
        assert "cacheRef <Object> An ActivationCache of the namespace." in told
        assert "cache <Object> An ActivationCache spec inline" in told
        assert "uri <string> A finished cache: the folder of its `manifest.json`." in told
        assert "live <Object> No cache: the model runs beside the training." in told

    def test_explain_names_the_values_and_whether_a_field_is_required(self, control_plane: ControlPlane) -> None:
        told = " ".join(control_plane.kubectl("explain", "saejob.spec.saes.architecture").split())
        assert "type <string> -required- enum: topk, batchtopk, " in told


@dataclass(frozen=True)
class Update:
    """A change of a resource.

    Attributes:
        start: edits of the valid spec that the resource begins with.
        change: edits of that.
        refused: field and message of each refusal; empty when the change is allowed.
    """

    kind: str
    change: Edits
    refused: dict[str, str] = field(default_factory=dict)
    start: Edits = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind}-{'-'.join(self.change)}"


def _immutable(kind: str, at: str, change: Edits, start: Edits | None = None) -> Update:
    message = f"{at.rsplit('.', 1)[-1]} is immutable; create a new resource instead"
    return Update(kind, change, {f"spec.{at}": message}, start or {})


_RAISED = "tokens can only be raised"
_ADDED = "hooks can only be added; create a new resource instead"
_LIVE = {"activations": live_activations({"dtype": "float32"})}
_INLINE = "activations.cache"
_FINISHED = {"activations": {"uri": "s3://saes/finished"}}

REFUSED_UPDATES = [
    _immutable(CACHE, "model", {"model.name": "gpt2-medium"}),
    _immutable(CACHE, "model", {"model.revision": "main"}),
    _immutable(CACHE, "dataset", {"dataset.path": "other"}),
    Update(CACHE, {"hooks": [{"name": "a"}]}, {"spec.hooks": _ADDED}),
    Update(CACHE, {"hooks": [{"name": "z"}]}, {"spec.hooks": _ADDED}, {"hooks": [{"name": "z"}, {"name": "y"}]}),
    Update(CACHE, {"hooks": [{"name": "z"}]}, {"spec.hooks": _ADDED}, {"hooks": [{"name": "z", "headIndex": 0}]}),
    _immutable(CACHE, "contextSize", {"contextSize": 64}),
    _immutable(CACHE, "seed", {"seed": 1}),
    _immutable(CACHE, "sampling", {"sampling.maxNormRatio": 0}),
    _immutable(CACHE, "storage", {"storage.uri": "s3://saes/other"}),
    Update(CACHE, {"tokens": 999}, {"spec.tokens": _RAISED}),
    Update(CACHE, {"retry": 0}, {"spec.retry": "retry can only be raised"}, {"retry": 1}),
    Update(JOB, {"retry": REMOVED}, {"spec.retry": "retry can only be raised"}, {"retry": 1}),
    _immutable(JOB, "saes", {"saes.0.name": "other"}),
    _immutable(JOB, "normalization", {"normalization": "none"}),
    _immutable(JOB, "evaluation", {"evaluation.everyTokens": 5}),
    _immutable(JOB, "checkpoints", {"checkpoints.keep": 3}),
    _immutable(JOB, "saeFormat", {"saeFormat": "saelens6"}),
    _immutable(JOB, "output", {"output.uri": "s3://saes/other"}),
    _immutable(JOB, f"{_INLINE}.model", {f"{_INLINE}.model.dtype": "float32"}),
    _immutable(JOB, f"{_INLINE}.storage", {f"{_INLINE}.storage.secretRef": {"name": "s3"}}),
    Update(JOB, {f"{_INLINE}.tokens": 999}, {f"spec.{_INLINE}.tokens": _RAISED}),
    Update(
        JOB,
        {f"{_INLINE}.hooks": [{"name": "b"}], "saes.0.hook": REMOVED},
        {f"spec.{_INLINE}.hooks": _ADDED, "spec.saes": "saes is immutable; create a new resource instead"},
        {"saes.0.hook": "transformer.h.7"},
    ),
    *(
        _immutable(JOB, f"activations.live.{name}", {f"activations.live.{name}": value}, _LIVE)
        for name, value in {
            "model": {"name": "other"},
            "dataset": {"path": "other"},
            "hooks": [{"name": "other"}],
            "contextSize": 64,
            "seed": 1,
            "sampling": {"positions": {"start": 1}},
            "dtype": "bfloat16",
            "bufferBytes": 2**20,
        }.items()
    ),
    Update(JOB, {"activations.live.tokens": 999}, {"spec.activations.live.tokens": _RAISED}, _LIVE),
    Update(
        JOB,
        {"activations": _FINISHED["activations"]},
        {f"spec.activations.{name}": f"{name} is immutable; create a new resource instead" for name in ("live", "uri")},
        _LIVE,
    ),
    Update(
        JOB,
        _FINISHED,
        {
            f"spec.activations.{name}": f"{name} is immutable; create a new resource instead"
            for name in ("cache", "uri")
        },
    ),
    _immutable(
        JOB,
        "activations.cacheRef",
        {"activations.cacheRef.name": "other"},
        {"activations": {"cacheRef": {"name": "one"}}},
    ),
    _immutable(JOB, "activations.uri", {"activations.uri": "s3://saes/other"}, _FINISHED),
    _immutable(JOB, "activations.region", {"activations.region": "eu-west-1"}, _FINISHED),
    _immutable(JOB, "activations.secretRef", {"activations.secretRef": {"name": "s3"}}, _FINISHED),
    _immutable(
        JOB,
        "activations.endpointUrl",
        {"activations.endpointUrl": REMOVED},
        {"activations": {"uri": "s3://saes/finished", "endpointUrl": "http://127.0.0.1:9000"}},
    ),
    *(
        _immutable(JOB, f"training.{name}", {f"training.{name}": value})
        for name, value in {
            "batchSize": 64,
            "learningRate": 3e-4,
            "learningRateEnd": 1e-5,
            "decaySteps": 7,
            "gradientClipNorm": 1,
            "learningRateSchedule": "cosineannealing",
            "restartCycles": 2,
            "warmUpSteps": 9,
            "adamBeta1": 0.5,
            "adamBeta2": 0.5,
            "deadAfterTokens": 5,
            "logEverySteps": 5,
            "optimizer": "adafactor",
            "mseLossNormalization": "dense_batch",
            "precision": "bfloat16",
            "selection": "bfloat16",
            "compile": True,
            "finetuning": {"method": "scale", "tokens": 5},
        }.items()
    ),
    _immutable(JOB, "training.batchSize", {"training.batchSize": REMOVED}, {"training.batchSize": 64}),
    Update(JOB, {"training.tokens": 9}, {"spec.training.tokens": _RAISED}, {"training.tokens": 10}),
    Update(JOB, {"training.tokens": REMOVED}, {"spec.training.tokens": _RAISED}, {"training.tokens": 10}),
    _immutable(JOB, "medianStop", {"medianStop": {"afterTokens": 10}}),
    _immutable(SWEEP, "medianStop", {"medianStop": {"afterTokens": 11}}, {"medianStop": {"afterTokens": 10}}),
    _immutable(SWEEP, "template.saes", {"template.saes.0.dSae": 2048}),
    _immutable(SWEEP, "template.output", {"template.output.uri": "s3://saes/other"}),
    Update(SWEEP, {"retry": 0}, {"spec.retry": "retry can only be raised"}, {"retry": 1}),
]
# All pod settings are for the next attempt.
_RUN = {
    "run.activeDeadlineSeconds": 86400,
    "run.startupDeadlineSeconds": 60,
    "run.ttlSecondsAfterFinished": 0,
    "run.terminationGracePeriodSeconds": 300,
    "run.queueName": "gpus",
    "run.priorityClassName": "high",
    "run.runtimeClassName": "nvidia",
    "run.serviceAccountName": "trainer",
    "run.shmSize": "8Gi",
    "run.volumes": [{"claimName": "hub", "mountPath": "/data"}],
    "run.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms": [
        {"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}
    ],
    "run.cpuSteps.nodeSelector": {"pool": "cpu"},
}
ALLOWED_UPDATES = [
    *(Update(kind, {name: value}) for kind in (CACHE, JOB) for name, value in _RUN.items()),
    Update(JOB, {f"{_INLINE}.{name}": value for name, value in _RUN.items()}),
    # What was set may be taken back.
    *(Update(kind, {"run": {}}, start=_RUN) for kind in (CACHE, JOB)),
    Update(CACHE, {"tokens": 1001}),
    Update(CACHE, {"hooks": [{"name": "a", "headIndex": 3}, {"name": "transformer.h.7"}]}),
    Update(CACHE, {"parallelism": 8, "run.image": "registry.example/job:2", "run.backoffLimit": 0}),
    Update(CACHE, {"suspend": True, "retry": 1}),
    Update(JOB, {"training.tokens": 11}, start={"training.tokens": 10}),
    Update(JOB, {"training.tokens": 11}),
    Update(JOB, {f"{_INLINE}.tokens": 2000, f"{_INLINE}.parallelism": 8, f"{_INLINE}.run.image": "job:2"}),
    Update(
        JOB,
        {f"{_INLINE}.hooks": [{"name": "transformer.h.7"}, {"name": "b"}]},
        start={"saes.0.hook": "transformer.h.7"},
    ),
    Update(JOB, {"activations.live.tokens": 1001}, start=_LIVE),
    Update(JOB, {"run.resources.limits": {"nvidia.com/gpu": 2}, "suspend": True, "retry": 1}),
    Update(JOB, {"training.batchSize": 64}, start={"training.batchSize": 64}),
    Update(JOB, {"parallelism": 4, "wandb": {"project": "saes"}}),
    Update(SWEEP, {"space.parameters.0.values": [16, 64], "maxParallel": 1, "trialsPerJob": 2}),
    Update(SWEEP, {"space": {"method": "random", "count": 3, "parameters": SPECS[SWEEP]["space"]["parameters"]}}),
    Update(SWEEP, {"template.training.tokens": 11, "template.run.image": "job:2", "suspend": True, "retry": 1}),
]


class TestUpdates:
    @pytest.mark.parametrize("update", REFUSED_UPDATES, ids=str)
    def test_what_determines_results_is_immutable(self, resources: Resources, update: Update) -> None:
        assert self.change(resources, update).causes == set(update.refused.items())

    @pytest.mark.parametrize("update", ALLOWED_UPDATES, ids=str)
    def test_what_the_next_attempt_can_take_up_may_change(self, resources: Resources, update: Update) -> None:
        answer = self.change(resources, update)
        assert answer.code == 200, answer.body

    def change(self, resources: Resources, update: Update) -> Answer:
        created = resources.create(manifest(update.kind, update.start))
        assert created.code == 201, created.body
        changed = manifest(update.kind, update.start)
        changed["spec"] = edited(changed["spec"], update.change)
        metadata = {key: created.body["metadata"][key] for key in ("name", "resourceVersion")}
        return resources.replace({**changed, "metadata": metadata})

    def test_each_rule_about_updates_has_a_case(self) -> None:
        rules = {
            rule.message
            for kind in KINDS.values()
            for model in all_models(kind.spec)
            for rule in model.TRANSITION_RULES
        }
        assert rules == {message for update in REFUSED_UPDATES for message in update.refused.values()}
