"""The cluster of a kubeconfig, with its user's rights: resources, watches, pods, logs and Secrets."""

from __future__ import annotations

import base64
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_job.errors import ClusterUnavailable, InvalidInput
from sae_operator.api.base import GROUP, OBJECT_NAME_PATTERN, VERSION
from sae_operator.api.resources import KINDS, Kind

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

LABEL_UID = f"{GROUP}/uid"
# Errors of the API server that its user can mend; others may pass.
_USER_ERRORS = (400, 401, 403, 404, 405, 422)
# A watch ends by itself after this and is begun again: a connection that died silently is found out.
WATCH_SECONDS = 300
ANSWER_SECONDS = 30.0
# An API server that is upgraded is away for a while: a watch of days goes on when it is back.
AWAY_SECONDS = 300.0
PAUSE_SECONDS = 1.0
# A pod may say nothing for long, while it loads a model, say.
SILENCE_SECONDS = 24 * 3600.0
PAGE = 500
# Of the container in which a pod's step runs; meshes and the like add others.
STEP_CONTAINER = "step"


@dataclass(frozen=True)
class Found:
    """A resource of ours.

    Attributes:
        body: the object as the API server has it.
    """

    kind: Kind
    body: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.body["metadata"]["name"]

    @property
    def namespace(self) -> str:
        return self.body["metadata"]["namespace"]

    @property
    def uid(self) -> str:
        return self.body["metadata"]["uid"]

    @property
    def status(self) -> Mapping[str, Any]:
        return self.body.get("status") or {}

    @property
    def label(self) -> str:
        return f"{self.kind.singular}/{self.name}"


def kind_named(word: str) -> Kind:
    """A kind by any of the names that kubectl takes.

    Raises:
        InvalidInput: there is none of that name.
    """
    plain = word.casefold()
    for kind in KINDS.values():
        if plain in (kind.kind.casefold(), kind.singular, kind.plural, *kind.short_names):
            return kind
    known = ", ".join(kind.short_names[0] for kind in KINDS.values())
    raise InvalidInput("UnknownKind", f"no kind is named {word!r}; there are {known}")


def connect(*, kubeconfig: Path | None, context: str | None, namespace: str | None) -> Cluster:
    """The cluster of a kubeconfig's context.

    Args:
        kubeconfig: the file; that of KUBECONFIG, or ~/.kube/config, when None.
        context: one of its contexts; the current one when None.
        namespace: overrides the context's.

    Raises:
        InvalidInput: there is no such file or context, or the file is broken.
    """
    from kubernetes import config
    from kubernetes.config.config_exception import ConfigException
    from yaml import YAMLError

    if namespace is not None and not re.match(OBJECT_NAME_PATTERN, namespace):
        raise InvalidInput("NoNamespace", f"{namespace!r} is no name of a namespace")
    path = None if kubeconfig is None else str(kubeconfig)
    chosen: Mapping[str, Any]
    try:
        contexts: Any
        contexts, chosen = config.list_kube_config_contexts(path)  # pyright: ignore[reportAssignmentType]
        if context is not None:
            names = [each["name"] for each in contexts]
            if context not in names:
                message = f"the kubeconfig has no context {context!r}; it has {', '.join(names)}"
                raise InvalidInput("NoCluster", message)
            chosen = next(each for each in contexts if each["name"] == context)
        client = config.new_client_from_config(path, context=context, persist_config=False)
    except (ConfigException, OSError) as error:
        message = f"no cluster is configured ({error}); set KUBECONFIG or give --kubeconfig"
        raise InvalidInput("NoCluster", message) from error
    except (YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        # What the client makes of a file that is no kubeconfig; what it says of it may hold a part of the file.
        message = "the kubeconfig cannot be read: it is no YAML, or not that of a kubeconfig; see `kubectl config view`"
        raise InvalidInput("NoCluster", message) from error
    return Cluster(client, namespace or (chosen.get("context") or {}).get("namespace") or "default")


class Cluster:
    """Resources and pods of one cluster.

    Methods raise `InvalidInput` for what the user must mend (a name, a right, a missing installation), and
    `ClusterUnavailable` when the API server cannot be reached or fails.

    Attributes:
        namespace: where resources are looked for unless told otherwise.
    """

    def __init__(self, client: ApiClient, namespace: str) -> None:
        from kubernetes.client import CoreV1Api, CustomObjectsApi

        self._objects, self._core = CustomObjectsApi(client), CoreV1Api(client)
        self.namespace = namespace

    def list(self, kind: Kind, *, all_namespaces: bool = False) -> list[Found]:
        """All resources of a kind, by namespace and name."""
        items: list[dict[str, Any]] = []
        token = ""
        while True:
            page = self._page(kind, all_namespaces, token)
            items += page["items"]
            token = page["metadata"].get("continue") or ""
            if not token:
                break
        found = [Found(kind, {**item, "kind": kind.kind}) for item in items]
        return sorted(found, key=lambda each: (each.namespace, each.name))

    def _page(self, kind: Kind, all_namespaces: bool, token: str) -> Any:
        options: dict[str, Any] = {"limit": PAGE, "_request_timeout": ANSWER_SECONDS}
        if token:
            options["_continue"] = token
        with _told(f"list {kind.plural}", installed=kind):
            if all_namespaces:
                page = self._objects.list_custom_object_for_all_namespaces(GROUP, VERSION, kind.plural, **options)
            else:
                page = self._objects.list_namespaced_custom_object(
                    GROUP, VERSION, self.namespace, kind.plural, **options
                )
            return _object(page)

    def find(self, reference: str) -> Found:
        """A resource by its name, or by `kind/name` where several kinds have one of that name."""
        word, separator, name = reference.rpartition("/")
        kinds = [kind_named(word)] if separator else list(KINDS.values())
        # Anything else would be another path at the API server: that of the list, say.
        named = re.match(OBJECT_NAME_PATTERN, name) is not None
        found = [each for kind in kinds if named and (each := self.get(kind, name)) is not None]
        if not found:
            what = " or ".join(kind.kind for kind in kinds)
            message = f"there is no {what} named {name!r} in namespace {self.namespace}; see `sae-job get`"
            raise InvalidInput("NotFound", message)
        if len(found) > 1:
            message = f"{name!r} is the name of several resources; write {' or '.join(each.label for each in found)}"
            raise InvalidInput("Ambiguous", message)
        return found[0]

    def get(self, kind: Kind, name: str) -> Found | None:
        """A resource; None when it does not exist."""

        def read() -> Found:
            body: Any = self._objects.get_namespaced_custom_object(
                GROUP, VERSION, self.namespace, kind.plural, name, _request_timeout=ANSWER_SECONDS
            )
            return Found(kind, _object(body))

        return self._optional(f"read {kind.singular} {name}", read)

    def watch(
        self,
        found: Found,
        *,
        seconds: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> Iterator[Found | None]:
        """Every state of a resource for so many seconds; None when it has been deleted.

        Raises:
            ClusterUnavailable: the API server has been away for `AWAY_SECONDS`.
        """
        answered = clock()
        end = answered + seconds
        while True:
            try:
                state, version = self._state(found)
                answered = clock()
                yield state
                if clock() >= end:
                    return
                for state in self._changes(found, version, end - answered):
                    answered = clock()
                    yield state
                    if clock() >= end:
                        return
            except ClusterUnavailable:
                if clock() >= min(end, answered + AWAY_SECONDS):
                    raise
            pause(PAUSE_SECONDS)

    def _state(self, found: Found) -> tuple[Found | None, str]:
        """A resource as it is, and the version of the cluster's state that this is true of: nothing is missed by a
        watch from there."""
        with _told(f"read {found.label}"):
            answer: Any = self._objects.list_namespaced_custom_object(
                GROUP,
                VERSION,
                self.namespace,
                found.kind.plural,
                field_selector=f"metadata.name={found.name}",
                _request_timeout=ANSWER_SECONDS,
            )
            page = _object(answer, "metadata", "items")
        return next((Found(found.kind, item) for item in page["items"]), None), page["metadata"]["resourceVersion"]

    def _changes(self, found: Found, version: str, seconds: float) -> Iterator[Found | None]:
        """The states from a version on, as one watch tells them; it ends by itself."""
        with _told(f"watch {found.label}"):
            answer = self._objects.list_namespaced_custom_object(
                GROUP,
                VERSION,
                self.namespace,
                found.kind.plural,
                field_selector=f"metadata.name={found.name}",
                resource_version=version,
                watch=True,
                timeout_seconds=max(1, round(min(WATCH_SECONDS, seconds))),
                _preload_content=False,
                _request_timeout=(ANSWER_SECONDS, WATCH_SECONDS + ANSWER_SECONDS),
            )
            for line in _lines(answer):
                event = _object(json.loads(line), "type", "object")
                if event["type"] == "ERROR":
                    return
                yield None if event["type"] == "DELETED" else Found(found.kind, _object(event["object"]))

    def pods(self, found: Found) -> list[Mapping[str, Any]]:
        """A resource's pods, oldest first, as the API server has them."""
        with _told("list pods"):
            answer = self._core.list_namespaced_pod(
                found.namespace,
                label_selector=f"{LABEL_UID}={found.uid}",
                _preload_content=False,
                _request_timeout=ANSWER_SECONDS,
            )
            items = _object(json.loads(_body(answer)), "items")["items"]
        return sorted(items, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))

    def log(self, namespace: str, pod: str, *, follow: bool, tail: int | None) -> Iterator[str]:
        """Lines of a pod's log."""
        options: dict[str, Any] = {} if tail is None else {"tail_lines": tail}
        with _told(f"read the log of pod {pod}"):
            answer = self._core.read_namespaced_pod_log(
                pod,
                namespace,
                container=STEP_CONTAINER,
                follow=follow,
                _preload_content=False,
                _request_timeout=(ANSWER_SECONDS, SILENCE_SECONDS) if follow else ANSWER_SECONDS,
                **options,
            )
            for line in _lines(answer):
                yield line.decode(errors="replace")

    def config_map(self, namespace: str, name: str) -> Mapping[str, str]:
        """Data of a ConfigMap; empty when there is none."""

        def read() -> Mapping[str, str]:
            answer = self._core.read_namespaced_config_map(
                name, namespace, _preload_content=False, _request_timeout=ANSWER_SECONDS
            )
            return json.loads(_body(answer)).get("data") or {}

        return self._optional(f"read ConfigMap {name}", read) or {}

    def secret(self, namespace: str, name: str) -> Mapping[str, bytes]:
        """Data of a Secret, which its user must be allowed to read."""
        with _told(f"read Secret {name}"):
            answer = self._core.read_namespaced_secret(
                name, namespace, _preload_content=False, _request_timeout=ANSWER_SECONDS
            )
            data = json.loads(_body(answer)).get("data") or {}
        return {key: base64.b64decode(value) for key, value in data.items()}

    def _optional(self, what: str, read: Callable[[], Any]) -> Any:
        from kubernetes.client import ApiException

        with _told(what):
            try:
                return read()
            except ApiException as error:
                if error.status == 404:
                    return None
                raise


def _body(answer: Any) -> bytes:
    try:
        return answer.data
    finally:
        answer.release_conn()


def _object(body: Any, *fields: str) -> Any:
    """What the API server has answered with.

    Raises:
        ValueError: it is no object of Kubernetes.
    """
    if not isinstance(body, Mapping) or not all(field in body for field in fields or ("metadata",)):
        raise ValueError("no object of Kubernetes")
    return body


def _lines(answer: Any) -> Iterator[bytes]:
    """Lines of a streamed answer as they arrive."""
    rest = b""
    try:
        for chunk in answer.stream(amt=None, decode_content=False):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line for line in lines if line)
        if rest:
            yield rest
    finally:
        answer.release_conn()


@contextmanager
def _told(what: str, *, installed: Kind | None = None) -> Iterator[None]:
    """Turns errors of the client into ones that tell their reader what to do."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        status = error.status or 0
        if status == 404 and installed is not None:
            message = f"the cluster does not know {installed.plural}; install the operator's CustomResourceDefinitions"
            raise InvalidInput("NotInstalled", message) from error
        if status == 401:
            raise InvalidInput("Unauthorized", f"cannot {what}: the kubeconfig's credentials are refused") from error
        if status in _USER_ERRORS:
            raise InvalidInput("Refused", f"cannot {what}: {_message(error.body, error.reason)}") from error
        raise ClusterUnavailable(f"cannot {what}: {_message(error.body, error.reason)}") from error
    except ValueError as error:
        told = "what answers is no API server; see the kubeconfig's address, and whether a proxy stands before it"
        raise ClusterUnavailable(f"cannot {what}: {told}") from error
    except (HTTPError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise ClusterUnavailable(f"cannot {what}: the API server does not answer: {reason}") from error


def _message(body: Any, reason: str | None) -> str:
    """What the API server says."""
    try:
        return json.loads(body)["message"]
    except (ValueError, KeyError, TypeError):
        return str(reason or body)
