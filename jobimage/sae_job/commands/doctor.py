"""`sae-job doctor`: whether a pod here has what jobs need, one line per check."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_job.commands.place import EndpointUrl, Region
from sae_job.errors import InvalidInput
from sae_operator.api.redaction import redact
from sae_operator.api.steps import ENV_POD_IP, PROGRESS_PORT, ExitCode
from sae_operator.api.store import SecretRef, StoreLocation

if TYPE_CHECKING:
    from sae_job.doctor.findings import Finding
    from sae_job.storage.base import ObjectStore

DOCTOR_EPILOG = (
    "Example: sae-job doctor --store s3://bucket/doctor --endpoint-url http://minio:9000 --gpus 1. "
    "In a cluster `helm test RELEASE` runs it in a pod."
)
_LOCAL_LARGE_BYTES = 2**20
# A day, in seconds.
LONGEST_WAIT = 86_400
_READS = {
    "--store": "it reads s3://BUCKET/PREFIX or file://DIR",
    "--endpoint-url": "it reads http://HOST:PORT or https://HOST",
    "--region": "it reads like us-east-1",
    "--secret": "its last part is the name of the Secret",
}
# Few, so that a server that does not answer is told within a minute.
_ATTEMPTS = 3


def doctor(
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            metavar="URI",
            help="Where to try what jobs rely on in a store: s3://bucket/prefix or file://DIR. All is removed again.",
            show_default=False,
        ),
    ] = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    secret: Annotated[
        Path | None,
        typer.Option(
            "--secret",
            metavar="DIR",
            help="Folder where a Secret with the store's credentials is mounted; else those of the environment serve.",
            show_default=False,
        ),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="GPUs that this pod must see.")] = 0,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to serve on, as steps do; 0 takes any.")
    ] = PROGRESS_PORT,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer", metavar="HOST:PORT", help="Another pod to reach, e.g. one with --wait; may be repeated."
        ),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            "--wait", min=0, max=LONGEST_WAIT, metavar="SECONDS", help="Serve so long after the checks, for a --peer."
        ),
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check what jobs need of a machine or pod: versions, GPUs, store, network, folders.

    One line for each check, with what to do where something is wrong. Exit code 1 when something is, 2 when the
    command itself is.
    """
    from sae_job.doctor.network import is_place

    for place in peer or []:
        if not is_place(place):
            raise InvalidInput("InvalidPeer", f"--peer {place!r} does not read HOST:PORT")
    opened = None if store is None else _open(store, endpoint_url, region, secret)
    found: list[Finding] = []
    for finding in _findings(opened, gpus=gpus, port=port, peers=peer or [], wait=wait):
        found.append(finding)
        if not as_json:
            typer.echo(finding.line())
    ok = all(finding.ok for finding in found)
    if as_json:
        typer.echo(json.dumps({"ok": ok, "checks": [finding.to_json() for finding in found]}, indent=1))
    if not ok:
        raise typer.Exit(ExitCode.FAILED)


def _open(uri: str, endpoint_url: str | None, region: str | None, secret: Path | None) -> ObjectStore:
    """The store, with the credentials of a mounted Secret where one is given.

    Raises:
        InvalidInput: no such folder or kind of store, or a broken address.
    """
    from pydantic import ValidationError
    from pydantic.alias_generators import to_camel

    from sae_job.storage.open import open_store
    from sae_job.storage.s3_store import S3Store, read_credentials

    if secret is not None and not secret.is_dir():
        raise InvalidInput("SecretMissing", f"--secret {secret}: no such folder; mount the Secret there")
    try:
        reference = None if secret is None else SecretRef(name=secret.resolve().name)
        location = StoreLocation(uri=uri, endpoint_url=endpoint_url, region=region, secret_ref=reference)
    except ValidationError as error:
        where = str((error.errors()[0]["loc"] or ("uri",))[0])
        options = {
            "endpointUrl": ("--endpoint-url", endpoint_url),
            "region": ("--region", region),
            "name": ("--secret", secret),
        }
        option, value = options.get(to_camel(where), ("--store", uri))
        raise InvalidInput("InvalidStore", f"{option} {redact(str(value))!r} is refused: {_READS[option]}") from error
    if not uri.startswith("s3://"):
        return open_store(location)
    mounted = None if secret is None else secret.resolve().parent
    return S3Store(location, read_credentials(location, mounted), attempts=_ATTEMPTS)


def _findings(store: ObjectStore | None, *, gpus: int, port: int, peers: list[str], wait: float) -> Iterator[Finding]:
    from sae_job.doctor.findings import Finding
    from sae_job.doctor.machine import check_folders, check_shared_memory
    from sae_job.doctor.network import check_own_port, check_peer, serving
    from sae_job.doctor.software import check_devices, check_packages, check_triton, look_for_devices

    yield check_packages()
    devices = look_for_devices()
    yield check_devices(devices, gpus, os.environ)
    yield check_triton(devices)
    yield from check_folders(os.environ)
    yield check_shared_memory(max(gpus, len(devices.gpus)))
    with ExitStack() as stack:
        try:
            served = stack.enter_context(serving(port))
        except OSError as error:
            yield Finding("own port", f"port {port} cannot be served ({error.strerror})", "choose another with --port")
        else:
            yield check_own_port(os.environ.get(ENV_POD_IP, ""), served)
        yield from map(check_peer, peers)
        yield from _store_findings(store)
        time.sleep(wait)


def _store_findings(store: ObjectStore | None) -> Iterator[Finding]:
    if store is None:
        return
    from sae_job.doctor.store import StoreCheck
    from sae_job.storage.s3_store import MULTIPART_BYTES

    check = StoreCheck(
        store,
        token=uuid.uuid4().hex[:12],
        # One byte more than fits into one request.
        large_bytes=MULTIPART_BYTES + 1 if store.uri.startswith("s3://") else _LOCAL_LARGE_BYTES,
        now=lambda: datetime.now(UTC),
        timer=time.monotonic,
    )
    yield from check.findings()
