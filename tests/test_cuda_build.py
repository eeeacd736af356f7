"""What was compiled for GPUs: every architecture, no spills, enough useful instructions, no other library of CUDA's."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from operators import FUNCTIONS, dwconv_gelu_sample, msca_strips_sample
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import cuda_static
from bench.__main__ import main
from segnext_kernels import _load, build_info, explain

pytestmark = pytest.mark.skipif(cuda_static.library() is None, reason=f"no CUDA kernels were built: {_load.cuda_failure}")


@pytest.fixture(scope="module")
def kernels() -> list[cuda_static.Kernel]:
    return cuda_static.kernels(cuda_static.library())


def test_architectures(kernels):
    """From Turing to Blackwell, unless the build was told otherwise."""
    built = {kernel.arch for kernel in kernels}
    if torch.version.cuda is not None:
        assert built == {"sm_" + name.removesuffix("+PTX").replace(".", "") for name in build_info()["cuda_architectures"]}
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert {"sm_75", "sm_80", "sm_90", "sm_100"} <= built


def test_no_spills(kernels):
    assert {kernel.name for kernel in kernels} == {"strips", "inputs", "taps", "convolution", "gradients", "reduce"}
    assert not [(k.name, k.dtype, k.layout, k.arch, k.local) for k in kernels if k.local > 0]


def test_most_instructions_of_the_inner_loops_are_multiply_adds(kernels):
    computing = [kernel for kernel in kernels if kernel.name != "reduce"]
    shares = {
        (k.name, k.dtype, k.layout, k.arch): [cuda_static.useful_share(own) for own in k.inner_loops()] for k in computing
    }
    assert all(shares.values())
    assert not {kernel: found for kernel, found in shares.items() if kernel[1] == "float32" and min(found) < 0.55}


def test_contiguous_rows_are_stored_16_bytes_at_a_time(kernels):
    """Others store single elements, where rows are not aligned, and sums."""
    for k in kernels:
        if k.name in ("strips", "inputs", "convolution", "gradients"):
            stores = Counter(cuda_static.opcode(text) for text in k.instructions)
            assert cuda_static.count(stores, "STG.E.128") > 0, k
            assert cuda_static.count(stores, "STG.E.64") == 0, k
            if k.name in ("strips", "convolution"):  # the others store sums of their taps too
                assert cuda_static.count(stores, "STG") - cuda_static.count(stores, "STG.E.128") == 1, k


def test_the_library_needs_no_other_of_cuda():
    """The CUDA runtime is linked in; torch's libtorch, whatever CUDA it has, knows the current stream."""
    dynamic = subprocess.run(["readelf", "-d", cuda_static.library()], check=True, capture_output=True, text=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "cu1" in name or "python" in name]
    if torch.version.cuda is not None:
        assert ctypes.CDLL(str(cuda_static.library())).aoti_torch_get_current_cuda_stream


STUB = r"""
#include <stdio.h>
#include <string.h>
int cuInit(unsigned flags) { fprintf(stderr, "woken\n"); return 100; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
static int refuse(void) { return 100; }
int cuGetProcAddress_v2(const char* name, void** found, int version, unsigned long flags, int* status) {
  *found = !strcmp(name, "cuInit") ? (void*)cuInit : !strcmp(name, "cuDriverGetVersion") ? (void*)cuDriverGetVersion
         : !strcmp(name, "cuGetProcAddress") ? (void*)cuGetProcAddress_v2 : (void*)refuse;
  if (status) *status = 0;
  return 0;
}
int cuGetProcAddress(const char* name, void** found, int version, unsigned long flags) {
  return cuGetProcAddress_v2(name, found, version, flags, 0);
}
int cuGetExportTable(const void** table, const void* id) { return 100; }
"""


@pytest.mark.skipif(torch.version.cuda is None or torch.cuda.is_available(), reason="needs a torch with CUDA and no driver")
@pytest.mark.parametrize("asked", [False, True], ids=["imported", "asked"])
def test_the_driver_sleeps_until_it_is_asked(asked, tmp_path):
    """Else no child of a process that imported the package and was forked could use a GPU."""
    (tmp_path / "stub.c").write_text(STUB)
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", tmp_path / "stub.c", "-o", tmp_path / "libcuda.so.1"], check=True)
    code = "import torch; torch.cuda.device_count = lambda: 0\n"  # which NVML says elsewhere
    code += "from segnext_kernels import _load\nassert _load.cuda_failure is None, _load.cuda_failure\n"
    code += "_load.cuda_driver()" * asked
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("woken" in done.stderr) == asked


def test_cuda_static_command(kernels, monkeypatch, capsys):
    monkeypatch.setattr(cuda_static, "kernels", lambda library: kernels)
    assert main(["cuda-static"]) == 0
    printed = capsys.readouterr().out
    assert "| strips | float32 | contiguous | sm_90 |" in printed
    assert "| H100 SXM | float32 | contiguous |" in printed and "| A100 SXM 80 GB | float16 | channels_last |" in printed


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
@pytest.mark.parametrize("operator", ["msca_strips", "dwconv_gelu"])
def test_tensors_of_a_gpu_that_is_not_there(operator):
    """Traced for a GPU: the kernels are chosen, and y and the gradients have the shapes, devices and strides they should."""
    sample = {"msca_strips": msca_strips_sample, "dwconv_gelu": dwconv_gelu_sample}[operator]((2, 5, 9, 12)).to(torch.float32)
    backward = getattr(torch.ops.segnext_kernels, f"{operator}_backward")  # autograd itself asks for the GPU
    with FakeTensorMode(), torch.device("cuda"):
        x, *filters = (torch.empty(leaf.shape) for leaf in sample.leaves)
        x = x.to(memory_format=torch.channels_last)
        assert explain(operator, x)["cuda"] == "serves"
        y = FUNCTIONS[operator](x, *filters, backend="cuda")
        grad_x, *grads = backward(y, x, *([filters] if operator == "msca_strips" else filters), True, True)
    grads = grads[0] if operator == "msca_strips" else grads
    assert y.stride() == grad_x.stride() == x.stride()
    assert [(grad.shape, grad.device.type) for grad in grads] == [(f.shape, "cuda") for f in filters]
