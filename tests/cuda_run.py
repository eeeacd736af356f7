"""The CUDA kernels run on the host: builds tests/cuda_host with g++ and calls it on tensors."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from operators import Sample
from torch import Tensor

HERE = Path(__file__).parent / "cuda_host"
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")
KERNELS = sorted(path.name for path in (CSRC / "cuda").glob("*.cu"))
GLUE = ("module.cpp", "host_run.cpp", "traffic.cpp")
# Null pointers end the program all the same, pointers that wrap around are never used, and the others see nothing with -O0: a
# sixth of the time.
UNSEEN = "-fno-sanitize=null,pointer-overflow,object-size,vptr"
SANITIZERS = {  # of kernels
    "address": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", UNSEEN],
    "thread": ["-g1", "-fsanitize=thread"],
}


def headers() -> Path | None:
    """The folder of CUDA's headers: a toolkit's, or that of the packages nvidia-cuda-runtime and nvidia-cuda-crt."""
    toolkits = [os.environ.get("CUDA_HOME"), shutil.which("nvcc") and nvcc_home()]
    folders = [Path(home, "include") for home in toolkits if home]
    folders += Path(sysconfig.get_path("purelib"), "nvidia").glob("*/include")
    found = (folder for folder in folders if (folder / "crt" / "host_config.h").exists() and (folder / "cuda_bf16.h").exists())
    return next(found, None)


def nvcc_home() -> str | None:
    said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    return next((line.split("TOP=")[1].strip() for line in said.splitlines() if "TOP=" in line), None)


def why_not() -> str | None:
    if platform.system() != "Linux" or platform.machine() != "x86_64" or COMPILER is None:
        return "the host run needs g++ on Linux, x86-64"
    return (
        None if headers() else "the host run needs CUDA's headers: a toolkit, or nvidia-cuda-runtime, -crt and -cccl from PyPI"
    )


def build(
    folder: Path,
    flags: Sequence[str] = (),
    csrc: Path = CSRC,
    reuse: Path | None = None,
    changed: Sequence[str] = (*KERNELS, *GLUE),
) -> Path:
    """Builds the module ``cuda_host`` into ``folder``: what is ``changed`` anew, kernels from ``csrc`` and with ``flags``, the
    rest is that of the build in ``reuse``."""
    folder.mkdir(parents=True, exist_ok=True)
    python = subprocess.run([sys.executable, "-m", "pybind11", "--includes"], check=True, capture_output=True, text=True).stdout
    includes = [f"-I{HERE}", f"-I{csrc}", "-isystem", headers(), *python.split()]
    common = [COMPILER, "-std=c++20", "-fPIC", "-w", *includes]
    cuda = ["-include", "host_run.h", "-x", "c++"]
    commands = {name: [*common, "-O1", *flags, *cuda, "-c", csrc / "cuda" / name] for name in KERNELS}
    commands |= {name: [*common, "-O2", *(cuda if name == "module.cpp" else []), "-c", HERE / name] for name in GLUE}
    objects, running = [], []
    # Of functions in headers, which several of them have, the first one's are taken.
    for name, command in sorted(commands.items(), key=lambda item: item[0] not in changed):
        made = folder / f"{name}.o"
        objects.append(made)
        if name in changed:
            running.append(subprocess.Popen([*command, "-o", made], stderr=subprocess.PIPE, text=True))
        else:
            made.symlink_to(reuse / made.name)
    failures = [process.communicate()[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(failures)
    library = folder / "cuda_host.so"
    # CUDA's functions are the host run's, whatever libcudart torch has loaded
    subprocess.run([COMPILER, "-shared", *flags, "-Wl,-Bsymbolic", "-o", library, *objects], check=True)
    return library


def load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_host", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class HostRun:
    """The module's kernels on tensors."""

    module: ModuleType

    def __call__(self, sample: Sample, grad_out: Tensor, layout: str, needed: tuple[bool, bool] = (True, True), **settings):
        """y and the gradients of a sample, as :func:`operators.results`, None for what is not needed of (x, filters)."""
        self.module.settings(**settings)
        channels_last = layout == "channels_last"
        x, *rest = (memory(leaf, channels_last and i == 0) for i, leaf in enumerate(sample.leaves))
        y = poisoned(x)
        getattr(self.module, sample.operator)(x.numpy(), [t.numpy() for t in rest], y.numpy(), channels_last)
        grad_x = poisoned(x) if needed[0] else None
        grads = [poisoned(t) for t in rest] if needed[1] else None
        getattr(self.module, f"{sample.operator}_backward")(
            memory(grad_out, channels_last).numpy(),
            x.numpy(),
            [t.numpy() for t in rest],
            None if grad_x is None else grad_x.numpy(),
            None if grads is None else [t.numpy() for t in grads],
            channels_last,
        )
        outputs = [y, grad_x, *(grads or [None] * len(rest))]
        models = [sample.x, sample.x, *sample.leaves[1:]]
        return [
            None if out is None else tensor(out, model, channels_last and i < 2)
            for i, (out, model) in enumerate(zip(outputs, models, strict=True))
        ]


def memory(t: Tensor, channels_last: bool) -> Tensor:
    """What lies in memory, for NumPy: [N, H, W, C] with channels_last, bfloat16 as uint16."""
    t = t.detach()
    t = (t.permute(0, 2, 3, 1) if channels_last else t).contiguous()
    return t.view(torch.uint16) if t.dtype == torch.bfloat16 else t


def tensor(t: Tensor, model: Tensor, channels_last: bool) -> Tensor:
    t = t.view(model.dtype)
    return t.permute(0, 3, 1, 2) if channels_last else t


def poisoned(like: Tensor) -> Tensor:
    """Memory full of NaN, of which a kernel must leave none."""
    if like.dtype == torch.uint16:
        return torch.full_like(like, 0x7FC1)
    return torch.full_like(like, torch.nan)
