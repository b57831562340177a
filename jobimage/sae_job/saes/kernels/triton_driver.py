"""Triton without a compiler in the pod.

Before it launches anything Triton compiles a small C module that calls NVIDIA's driver, always the same one. The job
image holds no compiler: this module is compiled while the image is built, where there is one and no driver is needed,

    python -m sae_job.saes.kernels.triton_driver

and Triton is handed it where it would compile. The kernels themselves are compiled by Triton, which needs no C
compiler for that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

# What Triton calls the module, and the library that it calls.
_MODULE = "cuda_utils"
_DRIVER = "libcuda.so.1"
_COMPILERS = ("gcc", "clang")


def built_module() -> Path:
    """Where the compiled module lies: beside the packages of this Python, and made for it."""
    return Path(sysconfig.get_path("data")) / "share" / "sae-job" / f"{_MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"


def use_built_module() -> None:
    """Have Triton take the compiled module, where there is one and no compiler."""
    from triton import knobs

    if "CC" in os.environ or any(map(shutil.which, _COMPILERS)) or not built_module().exists():
        return

    def build(name: str, *_: object) -> str:
        if name != _MODULE:
            raise RuntimeError(f"Triton wants {name} compiled, and there is no C compiler")
        return os.fspath(built_module())

    knobs.build.impl = build


def build_module(path: Path) -> None:
    """Compile the module of the installed Triton to `path`, linked to a driver that need not be here.

    Raises:
        subprocess.CalledProcessError: the compiler refuses.
    """
    from triton.backends.nvidia import driver

    source = Path(driver.__file__).parent
    includes = [source / "include", Path(sysconfig.get_path("include"))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # An empty library of that name, so that the module asks for the driver when it is loaded.
        stand_in = Path(folder) / _DRIVER
        compiler = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O3"]
        subprocess.run([*compiler, f"-Wl,-soname,{_DRIVER}", "-x", "c", os.devnull, "-o", stand_in], check=True)
        command = [*compiler, "-Wno-psabi", *(f"-I{include}" for include in includes), source / "driver.c", "-o", path]
        subprocess.run([*command, f"-L{folder}", "-Wl,--no-as-needed", f"-l:{_DRIVER}"], check=True)


def main() -> None:
    if find_spec("triton") is None:
        print("no Triton here, as in an image for CPUs: nothing to build")
        return
    build_module(built_module())
    print(f"Triton's module for NVIDIA's driver: {built_module()}")


if __name__ == "__main__":
    sys.exit(main())
