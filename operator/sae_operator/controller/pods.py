"""Lists the pods of one resource."""

from __future__ import annotations

from sae_operator.controller import paths
from sae_operator.controller.client import ApiClient
from sae_operator.controller.store import StoredResource
from sae_operator.reconcile import projection
from sae_operator.reconcile.names import LABEL_UID
from sae_operator.reconcile.observed import PodFacts


async def list_pods(client: ApiClient, stored: StoredResource) -> tuple[list[PodFacts], int]:
    """All pods of a resource, ended ones included, and the version of the listing."""
    pods, version = list[PodFacts](), 0
    query = {"labelSelector": f"{LABEL_UID}={stored.metadata.uid}"}
    async for page in client.pages(paths.pods(stored.key.namespace), query):
        pods += [projection.pod_facts(raw) for raw in page.items]
        version = page.version
    return pods, version
