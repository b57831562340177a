"""Reading a cache needs its store and nothing else: no network, no model, tokenizer or data set, nor a library of
theirs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sae_job.storage.file_store import FileStore
from tests.caches import finished_cache

READ_ALL = """
import socket, sys

allowed = {allowed!r}
forbidden = {{"transformers", "transformer_lens", "datasets", "huggingface_hub", "tokenizers", {store_library!r}}}


class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in forbidden:
            raise ImportError(f"reading must not import {{name}}")


def guarded(connect):
    def checked(self, address):
        if address != allowed:
            raise OSError(f"reading must not connect to {{address}}")
        return connect(self, address)
    return checked


sys.meta_path.insert(0, Refused())
socket.socket.connect = guarded(socket.socket.connect)
socket.socket.connect_ex = guarded(socket.socket.connect_ex)

from pathlib import Path

from sae_job.activations.manifest import read_manifest
from sae_job.activations.reader import CachedActivations, held_out_contexts_for
from sae_job.storage.open import open_store
from sae_operator.api.store import StoreLocation

store = open_store(StoreLocation(uri={uri!r}, endpoint_url={endpoint!r}), secrets_directory=None)
contexts = held_out_contexts_for(store, read_manifest(store), 100)
reader = CachedActivations.open(store, hooks=["layer.0"], batch_size=90, seed=0, held_out_contexts=contexts)
held_out = len(reader.held_out(1000).sequence)
for _ in range(20):
    reader.next_batch()
reader.close()
print(held_out, reader.epoch)
for kind in ("models", "text.documents", "text.tokenize"):
    assert f"sae_job.{{kind}}" not in sys.modules, kind
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FileStore:
    return finished_cache(tmp_path_factory.mktemp("cache"), tokens=1000)[0]


def read_all(uri: str, *, endpoint: str | None = None, allowed: tuple[str, int] | None = None) -> str:
    script = READ_ALL.format(
        uri=uri, endpoint=endpoint, allowed=allowed, store_library="boto3" if endpoint is None else "moto"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_folder_is_read_without_any_connection(cache: FileStore) -> None:
    assert read_all(f"file://{cache.root}") == "105 2\n"


@pytest.fixture
def server(cache: FileStore) -> Iterator[tuple[str, int]]:
    """The cache's objects as an S3 server gives them."""

    class Objects(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            data = cache.get(self.path.removeprefix("/bucket/cache/"))
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted:
                data = data[int(wanted[1]) : int(wanted[2]) + 1]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", '"1"')
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is said."""

    objects = ThreadingHTTPServer(("127.0.0.1", 0), Objects)
    objects.daemon_threads = True
    thread = threading.Thread(target=objects.serve_forever)
    thread.start()
    yield "127.0.0.1", objects.server_address[1]
    objects.shutdown()
    thread.join()
    objects.server_close()


def test_of_a_bucket_only_its_server_is_asked(server: tuple[str, int]) -> None:
    host, port = server
    assert read_all("s3://bucket/cache", endpoint=f"http://{host}:{port}", allowed=server) == "105 2\n"


def test_the_guards_of_these_tests_hold(cache: FileStore, server: tuple[str, int]) -> None:
    host, port = server
    with pytest.raises(AssertionError, match="reading must not connect to"):
        read_all("s3://bucket/cache", endpoint=f"http://{host}:{port}", allowed=("127.0.0.1", 1))
    with pytest.raises(AssertionError, match="reading must not import boto3"):
        read_all("s3://bucket/cache")
