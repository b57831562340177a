"""What the operator's administrator allows: images, ServiceAccounts, environment variables, and code that models'
repositories bring.

A refusal comes before anything is created. Pods that were let in when they were still allowed go on to their end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from sae_operator.api.activation_cache import ActivationCacheSpec, ModelSource
from sae_operator.api.run_settings import RunSettings
from sae_operator.api.sweep import SAESweepSpec
from sae_operator.api.training_job import SAETrainingJobSpec
from sae_operator.reconcile.names import DEFAULTS_CONFIG_MAP
from sae_operator.reconcile.observed import Defaults, InvalidSpec, JobFacts, OperatorSettings, SpecProblem

# Reason of the conditions of a resource that is refused here.
NOT_ALLOWED = "NotAllowed"
# A ConfigMap is not watched: what depends on one is looked at again after this time.
DEFAULTS_AGAIN_SECONDS = 60.0
# Patterns and problems that a message names.
SHOWN = 5
IMAGE_OF_DEFAULTS = f"ConfigMap {DEFAULTS_CONFIG_MAP}: image"
# The ServiceAccount of a pod that names none; every namespace has it.
DEFAULT_SERVICE_ACCOUNT = "default"
# Environment variables that resources may set where the administrator has no list: settings of the libraries in the job
# image, of what they use, and of the network. The specs' own rules refuse among them what would load other code.
KNOWN_ENV = (
    *("HF_*", "WANDB_*", "AWS_*", "NCCL_*", "OMP_*"),  # the ones that a message shows
    *("HUGGINGFACE_*", "HUGGING_FACE_*"),  # old names of some HF_*, which are read still
    *("TRANSFORMERS_*", "TRANSFORMERLENS_*", "TOKENIZERS_*", "DATASETS_*", "TQDM_*", "RUST_*"),
    *("TORCH_*", "TORCHINDUCTOR_*", "TORCHDYNAMO_*", "PYTORCH_*"),
    *("CUDA_*", "CUBLAS_*", "CUBLASLT_*", "CUDNN_*"),
    # Not NVIDIA_VISIBLE_DEVICES, which on some nodes shows a pod the GPUs of others.
    *("NVIDIA_TF32_OVERRIDE", "NVIDIA_DRIVER_CAPABILITIES"),
    *("GLOO_*", "UCX_*", "FI_*", "OFI_NCCL_*"),
    *("MKL_*", "KMP_*", "OPENBLAS_*", "MALLOC_*", "GOMP_*", "ONEDNN_*", "ATEN_CPU_CAPABILITY"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy", "all_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    *("TZ", "LANG", "LC_*", "NO_COLOR", "DO_NOT_TRACK"),
)


def check_cache(
    spec: ActivationCacheSpec, defaults: Defaults, settings: OperatorSettings, field: str = "spec"
) -> InvalidSpec | None:
    """What an ActivationCache asks for and may not have; None when it may have all."""
    return _refusal(_of_cache(spec, defaults, settings, field))


def check_training_job(
    spec: SAETrainingJobSpec,
    cache: ActivationCacheSpec | InvalidSpec | None,
    defaults: Defaults,
    settings: OperatorSettings,
) -> InvalidSpec | None:
    """The same of an SAETrainingJob; `cache` is the spec of the cache that it refers to, whose model it loads."""
    problems = list(_of_training_job(spec, defaults, settings, "spec"))
    reference = spec.activations.cache_ref
    if reference is not None and isinstance(cache, ActivationCacheSpec):
        problems += _of_model(cache.model, settings, f"ActivationCache {reference.name}: spec.model")
    return _refusal(problems)


def check_sweep(
    spec: SAESweepSpec, jobs: Iterable[SAETrainingJobSpec], defaults: Defaults, settings: OperatorSettings
) -> InvalidSpec | None:
    """The same of an SAESweep: of its template, and of the specs of its training jobs, whose images and accounts the
    sweep's parameters may set."""
    problems = list(_of_training_job(spec.template, defaults, settings, "spec.template"))
    known = {problem.message for problem in problems}
    for job in jobs:
        for problem in _of_training_job(job, defaults, settings, "spec.template"):
            if problem.message not in known:
                known.add(problem.message)
                problems.append(SpecProblem(problem.field, f"{problem.message} (set by spec.space.parameters)"))
    return _refusal(problems)


def is_let_on(jobs: Iterable[JobFacts], work: str, last_step: str) -> bool:
    """Whether a resource goes on in spite of a refusal: pods that were let in work still, or its last step has ended
    in this round, so that nothing is left to create."""
    return any(not job.finished or (job.work == work and job.step == last_step) for job in jobs)


def again_after(problem: InvalidSpec) -> float | None:
    """Seconds until a refusal is to be looked at again; None when only a change of the resource can help."""
    depends = any(found.field == IMAGE_OF_DEFAULTS for found in problem.problems)
    return DEFAULTS_AGAIN_SECONDS if depends else None


def _of_cache(
    spec: ActivationCacheSpec, defaults: Defaults, settings: OperatorSettings, field: str
) -> Iterator[SpecProblem]:
    yield from _of_run(spec.run, defaults, settings, f"{field}.run")
    yield from _of_model(spec.model, settings, f"{field}.model")


def _of_training_job(
    spec: SAETrainingJobSpec, defaults: Defaults, settings: OperatorSettings, field: str
) -> Iterator[SpecProblem]:
    yield from _of_run(spec.run, defaults, settings, f"{field}.run")
    if spec.activations.cache is not None:
        yield from _of_cache(spec.activations.cache, defaults, settings, f"{field}.activations.cache")
    if spec.activations.live is not None:
        yield from _of_model(spec.activations.live.model, settings, f"{field}.activations.live.model")


def _of_run(run: RunSettings, defaults: Defaults, settings: OperatorSettings, field: str) -> Iterator[SpecProblem]:
    # Where nothing names an image, it is the operator's own setting.
    image, place = (run.image, f"{field}.image") if run.image else (defaults.image, IMAGE_OF_DEFAULTS)
    if image and image != settings.job_image and not _matches(image, settings.allowed_images):
        yield SpecProblem(place, _unlisted("image", image, settings.allowed_images))
    account = run.service_account_name
    if account and account != DEFAULT_SERVICE_ACCOUNT and not _matches(account, settings.allowed_service_accounts):
        place = f"{field}.serviceAccountName"
        yield SpecProblem(place, _unlisted("ServiceAccount", account, settings.allowed_service_accounts))
    names = settings.allowed_env or KNOWN_ENV
    for index, variable in enumerate(run.env):
        if not _matches(variable.name, names):
            yield SpecProblem(f"{field}.env[{index}].name", _unlisted("environment variable", variable.name, names))


def _of_model(model: ModelSource, settings: OperatorSettings, field: str) -> Iterator[SpecProblem]:
    if model.trust_remote_code and not settings.allow_trust_remote_code:
        message = (
            "the operator does not allow code from models' repositories; leave it out, use a model that Transformers"
            " knows, or ask the administrator for --allow-trust-remote-code"
        )
        yield SpecProblem(f"{field}.trustRemoteCode", message)


def _matches(text: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatchcase(text, pattern) for pattern in patterns)


def _unlisted(what: str, asked: str, patterns: Sequence[str]) -> str:
    shown = ", ".join(patterns[:SHOWN]) + (", ..." if len(patterns) > SHOWN else "")
    return f'the operator does not allow {what} "{asked}"; use one that matches {shown}, or ask the administrator'


def _refusal(problems: Iterable[SpecProblem]) -> InvalidSpec | None:
    """The problems, each told once: the parts of a resource may share a default."""
    found = tuple(dict.fromkeys(problems))
    return InvalidSpec(found[:SHOWN]) if found else None
