"""`sae-operator`: runs the operator. The arguments are read before anything heavy is imported."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence

DEFAULT_JOB_IMAGE = "ghcr.io/sae-operator/job:0.1.0"
ENV_JOB_IMAGE = "SAE_OPERATOR_JOB_IMAGE"
ENV_NAMESPACE = "SAE_OPERATOR_NAMESPACE"


def _seconds(text: str) -> float:
    """A time of the command line; a negative one, or no pause between looks, would keep a core busy for nothing."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text}")
    return seconds


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="sae-operator",
        description="Kubernetes operator for ActivationCache and SAETrainingJob resources.",
        epilog="The cluster is that of --kubeconfig, of KUBECONFIG, of the pod's ServiceAccount, or of ~/.kube/config.",
    )
    made.add_argument(
        "-n",
        "--namespace",
        default=os.environ.get(ENV_NAMESPACE) or None,
        help=f"serve only this namespace (default: ${ENV_NAMESPACE}, else all)",
    )
    made.add_argument(
        "--job-image",
        default=os.environ.get(ENV_JOB_IMAGE) or DEFAULT_JOB_IMAGE,
        help=f"image of pods where nothing else names one (default: ${ENV_JOB_IMAGE}, else %(default)s)",
    )
    made.add_argument("--kubeconfig", help="kubeconfig file")
    made.add_argument(
        "--lease-namespace",
        help="namespace of the heartbeat's Lease (default: the served one, else the operator's own)",
    )
    made.add_argument("--liveness", metavar="URL", help="serve health there, e.g. http://0.0.0.0:8081/healthz")
    made.add_argument(
        "--poll-seconds",
        type=_seconds,
        default=5.0,
        help="seconds between looks at running pods (default: %(default)s)",
    )
    made.add_argument(
        "--progress-seconds",
        type=_seconds,
        default=10.0,
        help="seconds between updates of live progress (default: %(default)s)",
    )
    made.add_argument(
        "--result-grace-seconds",
        type=_seconds,
        default=30.0,
        help="seconds to wait for the message of a pod that has ended (default: %(default)s)",
    )
    made.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="format of the log (default: %(default)s)"
    )
    made.add_argument("-v", "--verbose", action="store_true", help="log what is done, call by call")
    made.add_argument("--version", action="store_true", help="print the version and exit")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    reader = parser()
    options = reader.parse_args(arguments)
    if options.namespace and options.lease_namespace not in (None, options.namespace):
        # Only the served namespace is watched: the heartbeat would never come back, and liveness would fail.
        reader.error("--lease-namespace must be the namespace of --namespace; leave it out")
    if options.version:
        from importlib.metadata import version

        print(f"sae-operator {version('sae-operator')}")
        return 0
    from sae_operator.controller import app, logs
    from sae_operator.controller.credentials import CredentialsError

    logs.configure(json_lines=options.log_format == "json", verbose=options.verbose)
    try:
        app.run(
            app.Options(
                job_image=options.job_image,
                namespace=options.namespace,
                kubeconfig=options.kubeconfig,
                lease_namespace=options.lease_namespace,
                liveness=options.liveness,
                poll_seconds=options.poll_seconds,
                progress_seconds=options.progress_seconds,
                result_grace_seconds=options.result_grace_seconds,
            )
        )
    except CredentialsError as error:
        logging.getLogger(__name__).error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
