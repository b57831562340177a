"""Versions of what is installed, and the devices that PyTorch sees."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from sae_job.doctor.findings import Finding, gigabytes

PROJECT = "sae-operator"
EXTRA = "job"
# Told by name: people ask for these first.
_SHOWN = ("torch", "transformers", "datasets", "safetensors", "boto3", "numpy")
_COMPILERS = ("gcc", "clang", "cc")


def installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_packages(
    requirements: Iterable[str] | None = None, *, installed: Callable[[str], str | None] = installed_version
) -> Finding:
    """Whether the packages of this environment are those that pods need.

    Args:
        requirements: of the job image, as packages state them; this package's own when None.
        installed: version of a package, or None.
    """
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in (requires(PROJECT) or [] if requirements is None else requirements)]
    mine = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": EXTRA})]
    wrong: list[str] = []
    shown: list[str] = []
    for requirement in mine:
        found = installed(requirement.name)
        if found is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
        elif requirement.name in _SHOWN:
            shown.append(f"{requirement.name} {found}")
    if wrong:
        return Finding("packages", ", ".join(wrong), f"pip install '{PROJECT}[{EXTRA}]', or use the job image")
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return Finding("packages", ", ".join([f"{PROJECT} {installed(PROJECT) or '?'}", python, *sorted(shown)]))


@dataclass(frozen=True)
class Devices:
    """What PyTorch and the node offer.

    Attributes:
        torch: PyTorch's version; None when it is not installed.
        cuda: CUDA's version that PyTorch was built for; None in a build for CPUs.
        gpus: name and bytes of memory of each GPU that PyTorch sees.
        files: device files of NVIDIA GPUs in this pod.
        triton: Triton's version.
        driver_module: whether Triton has its compiled driver module, or a compiler to make it.
    """

    torch: str | None
    cuda: str | None
    gpus: tuple[tuple[str, int], ...]
    files: int
    triton: str | None
    driver_module: bool


def look_for_devices() -> Devices:
    """The devices of this pod; imports PyTorch, where it is installed."""
    files = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    torch_version = installed_version("torch")
    cuda, gpus, module = None, (), False
    if torch_version is not None:
        import torch

        from sae_job.saes.kernels.triton_driver import built_module

        cuda = torch.version.cuda
        if torch.cuda.is_available():
            found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
            gpus = tuple((one.name, one.total_memory) for one in found)
        module = built_module().exists() or any(map(shutil.which, _COMPILERS))
    return Devices(torch_version, cuda, gpus, files, installed_version("triton"), module)


def check_devices(devices: Devices, wanted: int, environment: Mapping[str, str]) -> Finding:
    """Whether the pod sees the GPUs that it should.

    Args:
        wanted: GPUs that the pod asked for; 0 takes what is there.
    """
    count = len(devices.gpus)
    if devices.torch is None:
        return Finding("GPUs", "PyTorch is not installed", f"pip install '{PROJECT}[{EXTRA}]', or use the job image")
    if count < max(wanted, 1) and devices.files >= max(wanted, 1):
        if devices.cuda is None:
            told = f"{devices.files} in the pod, and PyTorch {devices.torch} is built for CPUs"
            return Finding("GPUs", told, "use an image with a CUDA build of PyTorch")
        told = f"{devices.files} in the pod, and PyTorch for CUDA {devices.cuda} sees {count}"
        return Finding("GPUs", told, "update the node's NVIDIA driver, or use an image with an older CUDA")
    if count < wanted:
        visible = environment.get("NVIDIA_VISIBLE_DEVICES")
        told = f"{count} of {wanted}" + (f" (NVIDIA_VISIBLE_DEVICES={visible})" if visible is not None else "")
        fix = (
            f"ask for them in limits (nvidia.com/gpu: {wanted}), and see that the node's device plugin and NVIDIA's "
            "container runtime run (runtimeClassName)"
        )
        return Finding("GPUs", told, fix)
    if count == 0:
        return Finding("GPUs", "none, and none asked for (--gpus N asks)")
    names = ", ".join(f"{name} {gigabytes(memory)}" for name, memory in devices.gpus)
    return Finding("GPUs", f"{count}: {names}; CUDA {devices.cuda}")


def check_triton(devices: Devices) -> Finding:
    """Triton, which the fused kernels are written in; images for CPUs do without."""
    if devices.triton is None:
        if devices.cuda is not None:
            return Finding("Triton", f"missing beside PyTorch for CUDA {devices.cuda}", "pip install triton")
        return Finding("Triton", "none: not needed on CPUs")
    if devices.gpus and not devices.driver_module:
        told = f"{devices.triton} without a compiled driver module, and no C compiler is here"
        return Finding("Triton", told, "run `python -m sae_job.saes.kernels.triton_driver` when you build the image")
    return Finding("Triton", devices.triton)
