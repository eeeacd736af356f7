"""What is shipped, and what an installation without compiler or without compiled kernels says. Nothing is compiled here."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import small
import torch
from operators import LIBRARIES

from segnext.export import export
from segnext_kernels import _load
from segnext_kernels._select import INFERENCE_OPERATORS

ROOT = Path(__file__).parents[1]
SHIPPED = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile"),
    *("csrc", "docs", "examples", "segnext", "segnext_kernels", "tests", "bench"),
)
VARIABLE = "SEGNEXT_KERNELS_COMPILE"
LEFT_OUT = ("CXX", VARIABLE, "PYTHONPATH", "CUDA_HOME", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST")  # of the environment


def python(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in LEFT_OUT}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True)


def checked(*arguments: str, cwd: Path, **variables: str) -> str:
    result = python(*arguments, cwd=cwd, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def modules(package: str) -> set[str]:
    """The package's modules and its data."""
    return {
        str(path.relative_to(ROOT))
        for ending in ("py", "txt", "html", "css", "js")
        for path in (ROOT / package).rglob(f"*.{ending}")
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the project without anything that was built."""
    copy = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def unpacked_sdist(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    checked("-m", "build", "--sdist", "--no-isolation", "--outdir", out, source, cwd=out, CXX="nonexistent")  # needs none
    (archive,) = out.iterdir()
    with tarfile.open(archive) as files:
        files.extractall(out, filter="data")
    return next(path for path in out.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def pure_wheel(unpacked_sdist, tmp_path_factory) -> Path:
    """Built from the sdist, so that a file missing there is missed here."""
    out = tmp_path_factory.mktemp("wheel")
    flags = ("--no-deps", "--no-build-isolation", "--no-index")
    checked("-m", "pip", "wheel", *flags, "--wheel-dir", out, unpacked_sdist, cwd=out, **{VARIABLE: "0"})
    (wheel,) = out.iterdir()
    return wheel


@pytest.fixture(scope="module")
def installed(pure_wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    checked("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, pure_wheel, cwd=target)
    return target


def test_sdist_has_every_source_and_no_tests(unpacked_sdist):
    files = {str(path.relative_to(unpacked_sdist)) for path in unpacked_sdist.rglob("*") if path.is_file()}
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    beside = {"setup.py", "pyproject.toml", "LICENSE", "Makefile", "docs/index.md"}  # README names the last two
    assert kernels | modules("segnext") | modules("segnext_kernels") | beside <= files
    assert not [name for name in files if name.startswith(("tests", "bench"))]


def test_pure_wheel_holds_the_two_packages(pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(pure_wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == modules("segnext") | modules("segnext_kernels")
    assert any(name.endswith("licenses/LICENSE") for name in names)


# Prints the wheel's tags and the libraries in it, without building them.
PLAN = (
    "import setuptools; from distutils.core import run_setup; d = run_setup('setup.py', ['--quiet'], stop_after='init');"
    "w, b = map(d.get_command_obj, ('bdist_wheel', 'build_ext')); w.ensure_finalized(); b.ensure_finalized();"
    "print(*w.get_tag()[:2], *(b.get_ext_filename(e.name) for e in d.ext_modules))"
)


def test_compiled_wheel_is_for_every_python_from_3_10(source):
    python_tag, abi_tag, *libraries = checked("-c", PLAN, cwd=source).splitlines()[-1].split()
    assert (python_tag, abi_tag) == ("cp310", "abi3")
    assert len(libraries) >= 2
    assert all(name.endswith(".abi3.so") for name in libraries)


def test_a_build_in_place_removes_libraries_of_an_earlier_one(source):
    """They would be loaded beside the new ones, which know another interface."""
    left, kept = source / "segnext_kernels" / "_C_cuda.abi3.so", source / "segnext_kernels" / "_C_baseline.abi3.so"
    for library in (left, kept):
        library.touch()
    build = "b.inplace, b.build_extensions, b.copy_extensions_to_source = 1, print, print; b.run()"
    checked("-c", f"{PLAN}; {build}", cwd=source, FORCE_CUDA="0")
    assert kept.exists() and not left.exists()
    kept.unlink()


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64")
def test_compiler_without_matrix_tiles_builds_the_rest(source, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    *said, plan = checked("-c", PLAN, cwd=source, CXX=str(compiler), FORCE_CUDA="0").splitlines()
    assert said == [
        "segnext-kernels: the CUDA kernels are left out: FORCE_CUDA=0",
        f"segnext-kernels: {compiler} does not know amx_bf16, so the kernels for it are left out",
    ]
    assert "_C_avx512_bf16" in plan and "amx" not in plan


@pytest.mark.skipif(importlib.util.find_spec("segnext_kernels._C_amx_bf16") is None, reason="no library for AMX was built")
def test_a_program_without_python_asks_for_the_tiles():
    """The system gives them only to who asks; of C++ programs that is the library itself (examples/aoti)."""
    path = importlib.util.find_spec("segnext_kernels._C_amx_bf16").origin
    symbols = subprocess.run(["readelf", "-W", "--dyn-syms", path], check=True, capture_output=True, text=True).stdout
    assert " syscall" in symbols


@pytest.mark.skipif(not LIBRARIES, reason=str(_load.failure))
def test_this_processor_has_a_compiled_library():
    assert _load.failure is None
    assert f"_C_{_load.facts['isa']}.abi3.so" in [library.name for library in LIBRARIES]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_compiled_library_needs_no_cpp_symbol_of_torch(library):
    """What makes one library serve every torch from 2.10 on: only C functions of it are linked."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True).stdout
    symbols = [line.split()[-1] for line in listing.splitlines()]
    assert any(symbol.startswith(("torch_", "aoti_torch_")) for symbol in symbols)
    assert not [symbol for symbol in symbols if re.match(r"_ZN?K?(2at|3c10|5torch)", symbol)]


def make_toolkit(folder: Path, release: str) -> Path:
    """A folder with an nvcc that knows one architecture more than ours."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\ncase $1 in --version) echo 'release {release}';; *) echo sm_60 sm_75 sm_90 sm_999;; esac\n")
    nvcc.chmod(0o755)
    return folder


@pytest.fixture
def toolkit(tmp_path) -> Path:
    """Of torch's own CUDA."""
    return make_toolkit(tmp_path / "toolkit", torch.version.cuda or "12.8")


@pytest.fixture
def newer_toolkit(tmp_path) -> Path:
    return make_toolkit(tmp_path / "newer", "99.1")


def test_cuda_is_built_for_the_architectures_of_torch_that_nvcc_knows(source, toolkit):
    *said, plan = checked("-c", PLAN, cwd=source, CUDA_HOME=str(toolkit), FORCE_CUDA="1").splitlines()
    assert said[0] == "segnext-kernels: the CUDA kernels are built for 7.5, 9.0+PTX"
    assert "segnext_kernels/_C_cuda.abi3.so" in plan.split()


def test_the_list_of_architectures_is_honoured(source, toolkit):
    variables = {"CUDA_HOME": str(toolkit), "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.6;9.0+PTX"}
    assert "built for 8.6, 9.0+PTX" in checked("-c", PLAN, cwd=source, **variables).splitlines()[0]


def test_an_architecture_that_is_no_number_is_an_error(source, toolkit, tmp_path):
    variables = {"CUDA_HOME": str(toolkit), "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "Hopper"}
    flags = ("--no-deps", "--no-build-isolation", "--no-index")
    done = python("-m", "pip", "wheel", *flags, source, cwd=tmp_path, **variables)
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST has 'Hopper': give numbers" in done.stdout + done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA, and builds with any")
def test_cuda_of_another_major_version_that_was_asked_for_is_an_error(source, newer_toolkit, tmp_path):
    flags = ("--no-deps", "--no-build-isolation", "--no-index")
    done = python("-m", "pip", "wheel", *flags, source, cwd=tmp_path, CUDA_HOME=str(newer_toolkit), FORCE_CUDA="1")
    assert done.returncode != 0 and "Traceback" not in done.stdout + done.stderr
    assert f"FORCE_CUDA=1, but nvcc is 99, torch has CUDA {torch.version.cuda}, and torch" in done.stdout + done.stderr


def test_cuda_of_another_major_version_is_left_out(source, newer_toolkit):
    said, *_, plan = checked("-c", PLAN, cwd=source, CUDA_HOME=str(newer_toolkit)).splitlines()
    assert said.startswith("segnext-kernels: the CUDA kernels are left out: ")
    assert "_C_cuda" not in plan
    assert "nvcc is 99" in said if torch.version.cuda else "this torch has no CUDA" in said


def test_cuda_without_nvcc(source, tmp_path):
    """Left out, with one line that says so; an error where it was asked for."""
    said, *_ = checked("-c", PLAN, cwd=source, CUDA_HOME=str(tmp_path)).splitlines()
    assert said.startswith("segnext-kernels: the CUDA kernels are left out: ")
    flags = ("--no-deps", "--no-build-isolation", "--no-index")
    done = python("-m", "pip", "wheel", *flags, source, cwd=tmp_path, CUDA_HOME=str(tmp_path), FORCE_CUDA="1")
    assert done.returncode != 0
    assert f"FORCE_CUDA=1, but there is no bin/nvcc in CUDA_HOME, {tmp_path}" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("found", [False, True], ids=["none", "old"])
def test_unfit_compiler_is_one_clear_error(source, tmp_path, found):
    compiler, out = tmp_path / "compiler", tmp_path / "out"
    out.mkdir()
    problem = f"no C++ compiler found ({compiler})"
    if found:
        compiler.write_text("#!/bin/sh\necho 'unrecognized option' $1 >&2\nexit 1\n")
        compiler.chmod(0o755)
        problem = f"{compiler} does not compile C++20 (unrecognized option -std=c++20)"
    flags = ("--no-deps", "--no-build-isolation", "--no-index")
    result = python("-m", "pip", "wheel", *flags, source, cwd=out, CXX=str(compiler))
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert output.count(problem) == 1
    assert f"{VARIABLE}=0" in output
    assert "Traceback" not in output
    assert not list(out.iterdir())


def test_installation_without_kernels_says_so_and_works(installed):
    script = """
import segnext_kernels, torch
from segnext_kernels.nn import AttentionModule
info = segnext_kernels.build_info()
assert segnext_kernels.__file__.startswith({installed!r}), segnext_kernels.__file__
assert info["isa"] is None and info["torch_built"] is None, info
assert segnext_kernels.explain("msca_strips", torch.ones(1, 3, 5, 4))["reference"] == "serves"
y = AttentionModule(3)(torch.ones(1, 3, 5, 4))
assert y.shape == (1, 3, 5, 4) and y.isfinite().all()
print(info["missing"]["cpu"])
"""
    # Without site, so that an editable installation in this environment cannot lend its compiled libraries.
    path = os.pathsep.join([str(installed), *(p for p in sys.path if p.endswith("-packages"))])
    reason = checked("-S", "-c", script.format(installed=str(installed)), cwd=installed, PYTHONPATH=path)
    assert "not built" in reason
    assert VARIABLE in reason


def test_exported_programs_run_without_kernels(installed, tmp_path):
    model, images = small.model(), torch.randn(1, 3, 64, 96)
    export(model, tmp_path / "model.pt2", "torch-export", (64, 96), labels=True)
    torch.save((images, model.predict(images)), tmp_path / "expected.pt")
    script = """
import segnext_kernels, torch, warnings
assert segnext_kernels.build_info()["isa"] is None
images, labels = torch.load("expected.pt")
with warnings.catch_warnings(record=True) as told, torch.no_grad():
    warnings.simplefilter("always")
    found = torch.export.load("model.pt2").module()(images)
assert (found == labels).float().mean() > 0.999
names = {str(one.message).split()[1] for one in told if "runs in plain PyTorch, which is slower" in str(one.message)}
print(*sorted(names))
"""
    path = os.pathsep.join([str(installed), *(p for p in sys.path if p.endswith("-packages"))])
    names = checked("-S", "-c", script, cwd=tmp_path, PYTHONPATH=path).split()
    assert names == sorted([*INFERENCE_OPERATORS, "upsample_argmax"])


def test_command_line_is_installed(installed):
    (entry_points,) = installed.glob("segnext_kernels-*.dist-info/entry_points.txt")
    assert "segnext = segnext.cli:main" in entry_points.read_text()
