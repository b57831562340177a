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
# Patterns, separated by commas.
ENV_ALLOWED_IMAGES = "SAE_OPERATOR_ALLOWED_IMAGES"
ENV_ALLOWED_SERVICE_ACCOUNTS = "SAE_OPERATOR_ALLOWED_SERVICE_ACCOUNTS"
ENV_ALLOWED_ENV = "SAE_OPERATOR_ALLOWED_ENV"
ENV_ALLOW_TRUST_REMOTE_CODE = "SAE_OPERATOR_ALLOW_TRUST_REMOTE_CODE"


def _seconds(text: str) -> float:
    """A time of the command line; a negative one, or no pause between looks, would keep a core busy for nothing."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text}")
    return seconds


def _pattern(text: str) -> str:
    """A pattern of the command line; an empty one would allow nothing and look as if it allowed all."""
    if not text.strip():
        raise argparse.ArgumentTypeError('must be a pattern such as "ghcr.io/team/*", not empty')
    if "," in text:
        raise argparse.ArgumentTypeError(f"must be one pattern, repeated for others, not {text}")
    return text.strip()


def _patterns(given: Sequence[str] | None, variable: str) -> tuple[str, ...]:
    """What the command line gives, else what the environment does.

    Raises:
        ValueError: the environment's list is set and has no pattern, which would allow all.
    """
    if given:
        return tuple(given)
    listed = os.environ.get(variable, "")
    patterns = tuple(part.strip() for part in listed.split(",") if part.strip())
    if listed and not patterns:
        raise ValueError(f"{variable} must hold patterns, separated by commas, or be empty, not {listed!r}")
    return patterns


def _address(text: str) -> str:
    from sae_operator.controller.endpoints import parse_address

    try:
        parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="sae-operator",
        description="Kubernetes operator for ActivationCache, SAETrainingJob and SAESweep resources.",
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
        "--metrics",
        metavar="URL",
        type=_address,
        help="serve Prometheus metrics there, e.g. http://0.0.0.0:8082/metrics, and readiness at /readyz",
    )
    made.add_argument(
        "--allowed-image",
        metavar="PATTERN",
        action="append",
        type=_pattern,
        help="images that resources and namespaces' defaults may name, e.g. 'ghcr.io/team/*'; may be repeated"
        f" (default: ${ENV_ALLOWED_IMAGES}, separated by commas, else all)",
    )
    made.add_argument(
        "--allowed-service-account",
        metavar="PATTERN",
        action="append",
        type=_pattern,
        help="ServiceAccounts that resources may name, beside `default`; may be repeated"
        f" (default: ${ENV_ALLOWED_SERVICE_ACCOUNTS}, separated by commas, else all)",
    )
    made.add_argument(
        "--allowed-env",
        metavar="PATTERN",
        action="append",
        type=_pattern,
        help="names of environment variables that resources may set, e.g. 'TEAM_*', instead of those of known libraries"
        f" (HF_*, WANDB_*, NCCL_*, ...); may be repeated (default: ${ENV_ALLOWED_ENV}, separated by commas, else known"
        " ones)",
    )
    made.add_argument(
        "--allow-trust-remote-code",
        action="store_true",
        default=os.environ.get(ENV_ALLOW_TRUST_REMOTE_CODE, "").lower() in ("1", "true", "yes"),
        help=f"let resources run code that a model's repository brings (default: ${ENV_ALLOW_TRUST_REMOTE_CODE}, else"
        " refused)",
    )
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
    try:
        images = _patterns(options.allowed_image, ENV_ALLOWED_IMAGES)
        service_accounts = _patterns(options.allowed_service_account, ENV_ALLOWED_SERVICE_ACCOUNTS)
        env = _patterns(options.allowed_env, ENV_ALLOWED_ENV)
    except ValueError as error:
        reader.error(str(error))
    if options.version:
        from importlib.metadata import version

        print(f"sae-operator {version('sae-operator')}")
        return 0
    from sae_operator.controller import app, logs
    from sae_operator.controller.credentials import CredentialsError
    from sae_operator.controller.endpoints import AddressUnusable

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
                metrics=options.metrics,
                allowed_images=images,
                allowed_service_accounts=service_accounts,
                allowed_env=env,
                allow_trust_remote_code=options.allow_trust_remote_code,
            )
        )
    except (AddressUnusable, CredentialsError) as error:
        logging.getLogger(__name__).error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
