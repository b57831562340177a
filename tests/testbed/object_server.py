"""A real S3 server on loopback: versitygw over a folder. Keys `a` and `a/b` cannot both exist on it."""

from __future__ import annotations

import http.client
import os
from pathlib import Path
from typing import Any

from tests.testbed.binaries import VERSITYGW, ensure_built
from tests.testbed.processes import ChildProcess, free_ports
from tests.testbed.waiting import wait_for

REGION = "us-east-1"


class ObjectServer:
    """One S3 server with one account; its objects lie as files below `directory/objects`."""

    access_key = "testbed"
    secret_key = "testbed-secret-key"
    region = REGION

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.endpoint: str
        self._child: ChildProcess | None = None

    def start(self) -> ObjectServer:
        """Start the server; raises `RuntimeError` with the log's end when it ends at once."""
        objects = self.directory / "objects"
        objects.mkdir(parents=True, exist_ok=True)
        (port,) = free_ports(1)
        self.endpoint = f"http://127.0.0.1:{port}"
        child = ChildProcess(
            "versitygw",
            [
                ensure_built(VERSITYGW),
                "--quiet",
                "--port",
                f"127.0.0.1:{port}",
                "--region",
                REGION,
                "posix",
                objects,
            ],
            log=self.directory / "versitygw.log",
            environment={**os.environ, "ROOT_ACCESS_KEY": self.access_key, "ROOT_SECRET_KEY": self.secret_key},
            directory=self.directory,
        )
        self._child = child

        def answers() -> bool:
            child.ensure_running()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("GET", "/")
                return connection.getresponse().status > 0  # an unsigned request is refused: it listens
            except OSError:
                return False
            finally:
                connection.close()

        wait_for(answers, what="the S3 server answers")
        return self

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None

    def __enter__(self) -> ObjectServer:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def client(self) -> Any:
        """A boto3 client of the server's account."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=Config(s3={"addressing_style": "path"}),
        )

    def create_bucket(self, name: str) -> str:
        """Create a bucket, which must not exist; returns its name."""
        self.client().create_bucket(Bucket=name)
        return name

    def secret(self, namespace: str, name: str = "s3") -> dict[str, object]:
        """Manifest of a Secret with this server's credentials, as resources name it in `secretRef`."""
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"namespace": namespace, "name": name},
            "stringData": {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key},
        }
