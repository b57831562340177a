"""The cluster of a kubeconfig, with its user's rights: resources, watches, pods, logs and Secrets."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_job.errors import ClusterUnavailable, InvalidInput
from sae_operator.api.base import GROUP, VERSION
from sae_operator.api.resources import KINDS, Kind

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

LABEL_UID = f"{GROUP}/uid"
# Errors of the API server that its user can mend; others may pass.
_USER_ERRORS = (400, 401, 403, 404, 405, 422)
# A watch ends by itself after this and is begun again: a connection that died silently is found out.
WATCH_SECONDS = 300
ANSWER_SECONDS = 30.0
# A pod may say nothing for long, while it loads a model, say.
SILENCE_SECONDS = 24 * 3600.0
PAGE = 500


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
        InvalidInput: there is no such file or context.
    """
    from kubernetes import config
    from kubernetes.config.config_exception import ConfigException

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
                return self._objects.list_custom_object_for_all_namespaces(GROUP, VERSION, kind.plural, **options)
            return self._objects.list_namespaced_custom_object(GROUP, VERSION, self.namespace, kind.plural, **options)

    def find(self, reference: str) -> Found:
        """A resource by its name, or by `kind/name` where several kinds have one of that name."""
        word, separator, name = reference.rpartition("/")
        kinds = [kind_named(word)] if separator else list(KINDS.values())
        found = [each for kind in kinds if (each := self.get(kind, name)) is not None]
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
            return Found(kind, body)

        return self._optional(f"read {kind.singular} {name}", read)

    def watch(
        self, found: Found, *, seconds: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> Iterator[Found | None]:
        """Every state of a resource for so many seconds, and None when it is deleted."""
        selector, end = f"metadata.name={found.name}", clock() + seconds
        while True:
            yield self.get(found.kind, found.name)
            left = end - clock()
            if left <= 0:
                return
            with _told(f"watch {found.label}"):
                answer = self._objects.list_namespaced_custom_object(
                    GROUP,
                    VERSION,
                    self.namespace,
                    found.kind.plural,
                    field_selector=selector,
                    watch=True,
                    timeout_seconds=max(1, round(min(WATCH_SECONDS, left))),
                    _preload_content=False,
                    _request_timeout=(ANSWER_SECONDS, WATCH_SECONDS + ANSWER_SECONDS),
                )
                for line in _lines(answer):
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        break
                    yield None if event["type"] == "DELETED" else Found(found.kind, event["object"])

    def pods(self, found: Found) -> list[Mapping[str, Any]]:
        """A resource's pods, oldest first, as the API server has them."""
        with _told("list pods"):
            answer = self._core.list_namespaced_pod(
                found.namespace,
                label_selector=f"{LABEL_UID}={found.uid}",
                _preload_content=False,
                _request_timeout=ANSWER_SECONDS,
            )
            items = json.loads(_body(answer))["items"]
        return sorted(items, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))

    def log(self, namespace: str, pod: str, *, follow: bool, tail: int | None) -> Iterator[str]:
        """Lines of a pod's log."""
        options: dict[str, Any] = {} if tail is None else {"tail_lines": tail}
        with _told(f"read the log of pod {pod}"):
            answer = self._core.read_namespaced_pod_log(
                pod,
                namespace,
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
    except (HTTPError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise ClusterUnavailable(f"cannot {what}: the API server does not answer: {reason}") from error


def _message(body: Any, reason: str | None) -> str:
    """What the API server says."""
    try:
        return json.loads(body)["message"]
    except (ValueError, KeyError, TypeError):
        return str(reason or body)
