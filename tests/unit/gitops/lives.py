"""Whole lives in the in-memory cluster, with every version of every object that a watch would show.

What is done and what has failed is read from the object store and the Jobs, never from a status, so that rules about
statuses can be checked against it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.base import API_VERSION
from sae_operator.api.identity import cache_location
from sae_operator.api.run_settings import RunSettings
from sae_operator.api.training_job import SAETrainingJobSpec
from sae_operator.reconcile.names import is_controlled_by
from tests.unit.reconcile.fake_cluster import CACHE, JOB, NAMESPACE, FakeCluster, PodScript
from tests.unit.reconcile.specs import cache_spec, job_spec


@dataclass(frozen=True)
class Version:
    """One version of an object, and the truth about it at that moment.

    Attributes:
        resource: the object as the API server shows it.
        written_by: `creation` or `edit` of its spec, or `operator`: its status.
        done: what its spec asks for is in the object store.
        failed_jobs: Jobs that have failed for it, or for the cache that was made for it.
    """

    resource: dict[str, Any]
    written_by: str
    done: bool
    failed_jobs: int

    @property
    def kind(self) -> str:
        return self.resource["kind"]

    @property
    def name(self) -> str:
        return self.resource["metadata"]["name"]

    @property
    def phase(self) -> str | None:
        return self.resource["status"].get("phase")


@dataclass
class WatchedCluster(FakeCluster):
    versions: list[Version] = field(default_factory=list)
    _shown: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    # By their names; the operator deletes one whose pods of one index have failed too often.
    _failed: dict[str, dict[str, Any]] = field(default_factory=dict)

    # Caches that the operator creates and extends for a job go through `create` and `edit`, too; a status is written at
    # most once per resource between two looks.

    def create(self, kind: str, name: str, spec: Mapping[str, Any]) -> None:
        self._record("operator")
        super().create(kind, name, spec)
        self._record("creation")

    def edit(self, kind: str, name: str, **changes: Any) -> None:
        self._record("operator")
        super().edit(kind, name, **changes)
        self._record("edit")

    def reconcile_all(self) -> None:
        self._failed |= {name: job for name, job in self.jobs.items() if _has_failed(job) or self._is_exhausted(name)}
        super().reconcile_all()
        self._record("operator")

    def of(self, kind: str, name: str | None = None) -> list[Version]:
        """All versions of an object, or of all objects of a kind."""
        return [version for version in self.versions if version.kind == kind and name in (None, version.name)]

    def _record(self, written_by: str) -> None:
        for (kind, name), raw in self.resources.items():
            if self._shown.get((kind, name)) != raw:
                self._shown[kind, name] = copy.deepcopy(raw)
                resource = {"apiVersion": API_VERSION, "kind": kind, **copy.deepcopy(raw)}
                self.versions.append(Version(resource, written_by, self._done(kind, raw), self._failed_jobs(kind, raw)))

    def _done(self, kind: str, raw: Mapping[str, Any]) -> bool:
        if kind == CACHE:
            cache = ActivationCacheSpec.model_validate(raw["spec"])
            place = cache_location(cache, NAMESPACE).uri
            there = {hook.key for hook in cache.hooks} <= self.stored_hooks.get(place, set())
            return there and self.stored_rows.get(place, 0) >= cache.tokens
        job = SAETrainingJobSpec.model_validate(raw["spec"])
        return self.finished_outputs.get(job.output.uri, 0) >= (job.training.tokens or 1)

    def _failed_jobs(self, kind: str, raw: Mapping[str, Any]) -> int:
        uids = {raw["metadata"]["uid"]}
        if kind == JOB:
            uids |= {
                cache["metadata"]["uid"]
                for (other, _), cache in self.resources.items()
                if other == CACHE and raw["metadata"]["uid"] in {o["uid"] for o in cache["metadata"]["ownerReferences"]}
            }
        return sum(any(is_controlled_by(job["metadata"], uid) for uid in uids) for job in self._failed.values())

    def _is_exhausted(self, job: str) -> bool:
        """Whether pods of one index have failed more often than a resource's default allows."""
        pods = (
            pod["metadata"]["annotations"]["index"] for pod in self.pods_of(job) if pod["status"]["phase"] == "Failed"
        )
        return max(Counter(pods).values(), default=0) > RunSettings().backoff_limit


def _has_failed(job: Mapping[str, Any]) -> bool:
    return any(condition["type"] == "Failed" for condition in job["status"].get("conditions") or [])


@dataclass
class Weather:
    """A script of pods that tests change while a cluster runs: which steps fail, and how long each takes."""

    broken: set[str] = field(default_factory=set)
    exit_code: int = 2
    seconds: int = 3

    def __call__(self, step: str, index: int, earlier: int) -> PodScript:
        if step in self.broken:
            return PodScript(seconds=1, exit_code=self.exit_code)
        return PodScript(seconds=self.seconds)


def _began(cluster: WatchedCluster, spec: Mapping[str, Any] | None = None) -> None:
    cluster.create(JOB, "sae", spec or job_spec())


def _succeeds(cluster: WatchedCluster, weather: Weather) -> None:
    _began(cluster)
    cluster.run()


def _a_cache_of_its_own(cluster: WatchedCluster, weather: Weather) -> None:
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run()


def _is_adopted(cluster: WatchedCluster, weather: Weather) -> None:
    cluster.finished_outputs["s3://saes/out"] = 1000
    _began(cluster)
    cluster.run()


def _preflight_fails(cluster: WatchedCluster, weather: Weather) -> None:
    weather.broken = {"preflight"}
    _began(cluster)
    cluster.run()


def _training_fails_by_its_backoff_limit(cluster: WatchedCluster, weather: Weather) -> None:
    weather.broken, weather.exit_code = {"train"}, 1
    _began(cluster)
    cluster.run()


def _its_cache_fails(cluster: WatchedCluster, weather: Weather) -> None:
    weather.broken = {"cache"}
    _began(cluster)
    cluster.run()


def _fails_and_is_retried(cluster: WatchedCluster, weather: Weather) -> None:
    _training_fails_by_its_backoff_limit(cluster, weather)
    weather.broken = set()
    cluster.edit(JOB, "sae", retry=1)
    cluster.run()


def _its_cache_fails_and_is_retried_by_the_job(cluster: WatchedCluster, weather: Weather) -> None:
    _its_cache_fails(cluster, weather)
    weather.broken = set()
    cluster.edit(JOB, "sae", retry=1)
    cluster.run()


def _is_suspended_and_resumed(cluster: WatchedCluster, weather: Weather) -> None:
    weather.seconds = 10
    _began(cluster)
    for phase in ("Preflight", "WaitingForCache", "Running"):
        cluster.run_until(lambda phase=phase: cluster.phase(JOB, "sae") == phase)
        cluster.edit(JOB, "sae", suspend=True)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Suspended")
        cluster.wait(3)
        cluster.edit(JOB, "sae", suspend=False)
    cluster.run()


def _begins_suspended(cluster: WatchedCluster, weather: Weather) -> None:
    _began(cluster, job_spec(suspend=True))
    cluster.run()


def _tokens_are_raised_when_it_has_finished(cluster: WatchedCluster, weather: Weather) -> None:
    _succeeds(cluster, weather)
    cluster.edit(JOB, "sae", training={"tokens": 4000})
    cluster.run()


def _tokens_are_raised_while_it_trains(cluster: WatchedCluster, weather: Weather) -> None:
    weather.seconds = 10
    _began(cluster)
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
    cluster.edit(JOB, "sae", training={"tokens": 4000})
    cluster.run()


def _a_cache_is_extended_when_it_is_ready_and_while_it_works(cluster: WatchedCluster, weather: Weather) -> None:
    _a_cache_of_its_own(cluster, weather)
    cluster.edit(CACHE, "acts", tokens=900)
    cluster.run_until(lambda: cluster.phase(CACHE, "acts") == "Caching")
    cluster.edit(CACHE, "acts", tokens=1500)
    cluster.run()


def _a_second_job_extends_the_cache_of_the_first(cluster: WatchedCluster, weather: Weather) -> None:
    _succeeds(cluster, weather)
    more = job_spec({"cache": cache_spec(tokens=1200)}, output={"uri": "s3://saes/second"})
    cluster.create(JOB, "second", more)
    cluster.run()


def _settings_of_a_finished_job_are_edited(cluster: WatchedCluster, weather: Weather) -> None:
    _succeeds(cluster, weather)
    cluster.edit(JOB, "sae", run={"backoffLimit": 1})
    cluster.run()
    cluster.edit(JOB, "sae", suspend=True)
    cluster.run()


def _the_api_server_takes_no_jobs_for_a_while(cluster: WatchedCluster, weather: Weather) -> None:
    cluster.quota_used_up = True
    _began(cluster)
    cluster.wait(5)
    cluster.quota_used_up = False
    cluster.run()


Life = Callable[[WatchedCluster, Weather], None]
# Each with what kstatus says of the job (of the cache, where there is no job) at its end.
LIVES: dict[Life, str] = {
    _succeeds: "Current",
    _a_cache_of_its_own: "Current",
    _is_adopted: "Current",
    _preflight_fails: "Failed",
    _training_fails_by_its_backoff_limit: "Failed",
    _its_cache_fails: "Failed",
    _fails_and_is_retried: "Current",
    _its_cache_fails_and_is_retried_by_the_job: "Current",
    _is_suspended_and_resumed: "Current",
    _begins_suspended: "InProgress",
    _tokens_are_raised_when_it_has_finished: "Current",
    _tokens_are_raised_while_it_trains: "Current",
    _a_cache_is_extended_when_it_is_ready_and_while_it_works: "Current",
    _a_second_job_extends_the_cache_of_the_first: "Current",
    _settings_of_a_finished_job_are_edited: "Current",
    _the_api_server_takes_no_jobs_for_a_while: "Current",
}


def name_of(life: Life) -> str:
    return life.__name__.strip("_")


def lead(life: Life) -> WatchedCluster:
    """A cluster after a life, with all versions of its objects."""
    weather = Weather()
    cluster = WatchedCluster(weather)
    life(cluster, weather)
    return cluster
