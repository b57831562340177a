"""A real S3 server for the benchmarks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_job.storage.base import ObjectStore
from sae_job.storage.open import open_store
from sae_operator.api.store import SecretRef, StoreLocation
from tests.testbed.object_server import ObjectServer

BUCKET = "bench"
SECRET = "bench-s3"


@dataclass(frozen=True)
class S3Place:
    """A bucket on a server of our own.

    Attributes:
        directory: scratch folder, removed afterwards.
        secrets: where the Secret lies.
        endpoint: address of the server.
    """

    directory: Path
    secrets: Path
    endpoint: str

    def client(self) -> Any:
        """A boto3 client of the server's account."""
        server = ObjectServer(self.directory)
        server.endpoint = self.endpoint
        return server.client()

    def store(self, prefix: str) -> ObjectStore:
        location = StoreLocation(
            uri=f"s3://{BUCKET}/{prefix}", endpoint_url=self.endpoint, secret_ref=SecretRef(name=SECRET)
        )
        return open_store(location, secrets_directory=self.secrets)


@contextmanager
def s3_server() -> Iterator[S3Place]:
    """Run an S3 server on loopback while the block runs."""
    with tempfile.TemporaryDirectory(prefix="sae-bench-") as name:
        directory = Path(name)
        server = ObjectServer(directory / "server").start()
        try:
            server.create_bucket(BUCKET)
            secret = directory / "secrets" / SECRET
            secret.mkdir(parents=True)
            (secret / "AWS_ACCESS_KEY_ID").write_text(server.access_key)
            (secret / "AWS_SECRET_ACCESS_KEY").write_text(server.secret_key)
            yield S3Place(directory, directory / "secrets", server.endpoint)
        finally:
            server.stop()
