"""What the figures depend on."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cache
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

import torch

import segnext_kernels
from segnext.export.formats import ONNX_RUNTIME
from segnext_kernels._load import ISA_VARIABLE

from .case import Case, device
from .exported import OPENVINO

ROOT = Path(__file__).parents[1]
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE", ISA_VARIABLE)  # which change the speed


def environment() -> dict[str, object]:
    """Processor, threads, instruction set, versions, command; None for a package that is not installed."""
    info = segnext_kernels.build_info()
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if device().type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "isa": info["isa"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": info["compiler"],
        "segnext_kernels": info["version"],
        "commit": _commit(),
        "date": datetime.now().astimezone().isoformat(" ", "minutes"),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
        **{package: _version(package) for package in dict.fromkeys(ONNX_RUNTIME + OPENVINO)},
        "missing": info["missing"],
    }


@cache
def _commit() -> str | None:
    """What git calls the code; None without git or its folder."""
    if not Path(ROOT, ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _version(package: str) -> str | None:
    """Of what brought it, which may be called otherwise, such as onnxruntime-gpu."""
    if find_spec(package) is None:
        return None
    names = _brought().get(package)
    return version(names[0]) if names else "of unknown version"


@cache
def _brought() -> Mapping[str, list[str]]:
    """What brought each package; all that is installed is gone through for it."""
    return packages_distributions()


def missing(cases: Iterable[Case]) -> dict[str, str]:
    """The contenders that cannot run here, and why."""
    contenders = [contender for case in cases for contender in case.contenders]
    return {contender.label: why for contender in contenders if (why := contender.why_not())}


def heading(figures: dict) -> list[str]:
    """Paragraphs on the environment and the missing peers of a report's figures."""
    facts = {key: value for key, value in figures["environment"].items() if value}
    backends = facts.pop("missing", {})
    parts = ["; ".join(f"{key} {value}" for key, value in facts.items())]
    parts += [f"no {backend}: {why}" for backend, why in backends.items()]
    return parts + [f"missing peer {peer}: {why}" for peer, why in figures["missing_peers"].items()]


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
