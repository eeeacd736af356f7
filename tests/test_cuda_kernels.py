"""The CUDA kernels, run on the host (cuda_run.py): values, memory, races, traffic. On a GPU: test_gpu.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_run
import cuda_traffic
import pytest
import torch
from operators import (
    EMPTY_IMAGES,
    IMAGES,
    Sample,
    assert_same,
    dwconv_gelu_sample,
    error,
    grad_like,
    image_layouts,
    msca_strips_sample,
    name,
    tolerance,
)

from bench import cuda_static

pytestmark = pytest.mark.skipif(cuda_run.why_not() is not None, reason=str(cuda_run.why_not()))

SAMPLES = {"msca_strips": msca_strips_sample, "dwconv_gelu": dwconv_gelu_sample}
# Beyond what every operator is tested on: several tiles of columns in both layouts, parts of rows, several images in a block.
SHAPES = [*IMAGES, (2, 24, 70, 70), (1, 8, 20, 136), (1, 16, 64, 72), (300, 3, 6, 5), *EMPTY_IMAGES]

operators = pytest.mark.parametrize("operator", SAMPLES)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Path:
    return cuda_run.build(tmp_path_factory.mktemp("cuda_host"))


@pytest.fixture(scope="module")
def host_run(kernels) -> cuda_run.HostRun:
    return cuda_run.HostRun(cuda_run.load(kernels))


def check(sample: Sample, got: list) -> None:
    """Every result within its dtype's tolerance of the float64 reference."""
    want = sample.exact(grad_like(sample.x))
    wrong = [
        f"{name(i)} {error(g, w):.2e} (allowed {tolerance(g.dtype):.1e})"
        for i, (g, w) in enumerate(zip(got, want, strict=True))
        if g is not None and not error(g, w) <= tolerance(g.dtype)
    ]
    assert not wrong, "relative errors: " + ", ".join(wrong)


@operators
@shapes
@dtypes
@image_layouts
def test_values_and_gradients(operator, shape, dtype, layout, host_run):
    sample = SAMPLES[operator](shape).to(dtype)
    check(sample, host_run(sample, grad_like(sample.x), layout, order=len(shape) + shape[-1]))


@operators
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@image_layouts
def test_float32_filters_beside_16_bits(operator, dtype, layout, host_run):
    sample = SAMPLES[operator]((2, 17, 13, 37)).to(torch.float32)
    sample = sample.with_x(sample.x.to(dtype))
    check(sample, host_run(sample, grad_like(sample.x), layout))


@operators
@image_layouts
def test_any_order_of_threads_gives_the_same_bits(operator, layout, host_run):
    sample = SAMPLES[operator]((2, 17, 37, 70)).to(torch.float32)
    results = [host_run(sample, grad_like(sample.x), layout, order=order) for order in range(4)]
    for other in results[1:]:
        assert_same(other, results[0])


@operators
@pytest.mark.parametrize("kibibytes", [64, 99, 163])
@pytest.mark.parametrize("shape", [(1, 33, 24, 200), (1, 33, 2, 2), (1, 256, 4, 4), (1, 64, 8, 8), (1, 48, 16, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@image_layouts
def test_little_shared_memory(operator, kibibytes, shape, dtype, layout, host_run):
    """What a block may have on Turing, on Ampere, Ada and Blackwell without HBM, and on an A100."""
    sample = SAMPLES[operator](shape).to(dtype)
    check(sample, host_run(sample, grad_like(sample.x), layout, shared_limit=kibibytes * 1024))
    assert max(cut["shared_bytes"] for cut in host_run.module.cuts()) <= kibibytes * 1024


@operators
@image_layouts
@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=["x", "filters"])
def test_only_what_is_needed(operator, layout, needed, host_run):
    sample = SAMPLES[operator]((2, 17, 21, 70)).to(torch.float32)
    full = host_run(sample, grad_like(sample.x), layout)
    got = host_run(sample, grad_like(sample.x), layout, needed)
    assert [g is not None for g in got] == [True, needed[0]] + [needed[1]] * (len(got) - 2)
    assert_same([g for g in got if g is not None], [f for f, g in zip(full, got, strict=True) if g is not None])


@operators
@image_layouts
def test_memory_that_is_not_aligned(operator, layout, host_run):
    """Rows of 16 bytes in tensors that begin 4 bytes off."""
    sample = SAMPLES[operator]((1, 8, 12, 24)).to(torch.float32)
    off = torch.empty(sample.x.numel() + 1)[1:].view(1, 12, 24, 8) if layout == "channels_last" else None
    off = torch.empty(sample.x.numel() + 1)[1:].view(sample.x.shape) if off is None else off.permute(0, 3, 1, 2)
    shifted = sample.with_x(off.copy_(sample.x))
    assert_same(host_run(shifted, grad_like(sample.x), layout), host_run(sample, grad_like(sample.x), layout))


def test_gelu_and_its_slope_everywhere(host_run):
    """Images of one pixel under a filter of one tap: y is GELU(x) and the gradient its slope."""
    x = torch.cat([torch.linspace(-20, 20, 20001), torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38])])
    weight = torch.zeros(1, 1, 3, 3)
    weight[..., 1, 1] = 1
    sample = Sample("dwconv_gelu", (x.view(-1, 1, 1, 1), weight, torch.zeros(1)))
    y, slope, *_ = (out.flatten() for out in host_run(sample, torch.ones(len(x), 1, 1, 1), "contiguous", (True, True)))
    z = x.double().requires_grad_()
    exact = torch.nn.functional.gelu(z)
    (exact_slope,) = torch.autograd.grad(exact.sum(), z)
    assert ((y - exact)[:-5].abs() <= 1e-7 * x[:-5].abs().clamp(min=1)).all()
    assert ((slope - exact_slope)[:-5].abs() <= 2e-7).all()
    assert y[-5:-3].tolist() == [torch.inf, 0] and y[-3].isnan() and y[-2:].tolist() == [x[-2], 0]
    assert slope[-3].isnan() and slope[-2:].tolist() == [1, 0]


@operators
@image_layouts
def test_offsets_beyond_32_bits(operator, layout, host_run):
    """The last channels of an image of more than 2^31 elements, most of whose memory is never touched."""
    channels, side, module = 131088, 128, host_run.module
    memory = (1, channels, side, side) if layout == "contiguous" else (1, side, side, channels)
    x, y = (torch.empty(memory, dtype=torch.float16) for _ in range(2))
    view, out = (t if layout == "contiguous" else t.permute(0, 3, 1, 2) for t in (x, y))
    sample = SAMPLES[operator]((1, 16, side, side)).to(torch.float16)
    view[:, -16:] = sample.x
    filters = [torch.zeros(channels, leaf[0].numel(), dtype=torch.float16) for leaf in sample.leaves[1:]]
    for mine, leaf in zip(filters, sample.leaves[1:], strict=True):
        mine[-16:] = leaf.view(16, -1)
    arguments = (x.numpy(), [f.numpy() for f in filters], y.numpy(), layout == "channels_last")
    module.settings(count=0)
    getattr(module, operator)(*arguments)
    (cut,) = module.cuts()
    last = -(-16 // cut["channels"])  # groups of channels
    assert channels % cut["channels"] == 0 and 16 % cut["channels"] == 0
    for group in range(cut["groups"] - last, cut["groups"]):
        module.settings(first=group, step=cut["groups"])
        getattr(module, operator)(*arguments)
    assert error(out[:, -16:], sample.exact()[0]) <= tolerance(torch.float16)


def sanitize(kind: str, folder: Path, operator: str = "all") -> subprocess.CompletedProcess[str]:
    """Runs cuda_host/sanitized.py on a build with the sanitizer of that kind, "none" for one without."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ASAN_OPTIONS": "detect_leaks=0"}
    environment["TSAN_OPTIONS"] = "ignore_noninstrumented_modules=1 halt_on_error=1"
    if kind != "none":  # with the C++ runtime, of which the sanitizer wants to know from the start
        libraries = {"address": "libasan.so", "thread": "libtsan.so"}[kind], "libstdc++.so"
        found = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True) for name in libraries]
        environment["LD_PRELOAD"] = " ".join(done.stdout.strip() for done in found)
    command = [sys.executable, cuda_run.HERE / "sanitized.py", folder, operator]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def sanitized(kernels, tmp_path_factory) -> dict[str, Path]:
    """The folders of builds with each sanitizer and of one with none."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in cuda_run.SANITIZERS}
    for kind, folder in folders.items():
        cuda_run.build(folder, cuda_run.SANITIZERS[kind], reuse=kernels.parent, changed=cuda_run.KERNELS)
    return folders | {"none": kernels.parent}


@pytest.mark.parametrize("kind", cuda_run.SANITIZERS)
def test_sanitizers_find_nothing(kind, sanitized):
    done = sanitize(kind, sanitized[kind])
    assert (done.returncode, done.stdout.strip()) == (0, "clean"), done.stderr[-4000:]


def planted(
    tmp_path: Path, file: str, old: str, new: str, kind: str, folders: dict[str, Path], number: int = 0
) -> subprocess.CompletedProcess[str]:
    """Runs msca_strips with a bug: occurrence ``number`` of ``old`` in ``file`` is ``new``."""
    shutil.copytree(cuda_run.CSRC, tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / file
    parts = source.read_text().split(old)
    assert len(parts) > number + 1, f"{file} has no {old!r}"
    source.write_text(old.join(parts[: number + 1]) + new + old.join(parts[number + 1 :]))
    changed = file if file.endswith(".cu") else "msca_strips.cu"
    cuda_run.build(tmp_path / "built", cuda_run.SANITIZERS.get(kind, []), tmp_path / "csrc", folders[kind], [changed])
    return sanitize(kind, tmp_path / "built", "msca_strips")


BARRIER = "__syncthreads();"
BARRIERS = len(re.findall(re.escape(BARRIER), (cuda_run.CSRC / "cuda" / "msca_strips.cu").read_text()))


@pytest.mark.parametrize("number", range(BARRIERS))
def test_thread_sanitizer_misses_no_removed_barrier(number, sanitized, tmp_path):
    done = planted(tmp_path, "msca_strips.cu", BARRIER, ";", "thread", sanitized, number)
    assert done.returncode != 0 and "data race" in done.stderr, done.stdout + done.stderr[-2000:]


# What is planted, and which sanitizer, or the runtime without one, says what.
PLANTED = {
    "one-column-too-many": ("rows.h", "min(last, t_.width)", "min(last, t_.width + 1)", "address", "buffer-overflow"),
    "one-row-too-many": ("rows.h", "row + r < tile.end_row", "row + r <= tile.end_row", "address", "buffer-overflow"),
    "misaligned": ("msca_strips.cu", "put<2>(x, row - 2", "put<4>(x, row - 2", "address", "misaligned address"),
    "divergent-barrier": ("msca_strips.cu", "if (active) {", "if (active) { __syncthreads();", "none", "divergent barrier"),
    "no-warp-barrier": ("rows.h", "__syncwarp();", ";", "thread", "data race"),
    "no-wait": ("rows.h", "wait_async();", ";", "none", "copies landed"),
}


@pytest.mark.parametrize(("file", "old", "new", "kind", "said"), PLANTED.values(), ids=PLANTED)
def test_planted_bugs_are_found(file, old, new, kind, said, sanitized, tmp_path):
    done = planted(tmp_path, file, old, new, kind, sanitized)
    assert done.returncode != 0 and said in done.stderr, done.stdout + done.stderr[-4000:]


STAGES = sorted({stage for model in (cuda_traffic.T, cuda_traffic.B) for stages in model.values() for stage in stages})
# Part of what must be moved; the second where whole rows of tiles make less than a block for each of 128 multiprocessors in
# channels_last: an H100 was faster with as many as these (csrc/cuda/README.md).
MOST_TRAFFIC = {("forward", 16): (1.15, 1.25), ("forward", 1): (1.5, 2.1), ("backward", 16): (1.3, 1.3)}


@pytest.mark.parametrize(("direction", "batch"), MOST_TRAFFIC, ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", cuda_traffic.DTYPES)
@image_layouts
def test_traffic(direction, batch, dtype, layout, host_run):
    """Of every stage of T and B at 512x512 and 1024x1024; forward moves what its design says to the last byte."""
    wrong = []
    for channels, side in STAGES if direction == "forward" else cuda_traffic.T[512]:
        row = cuda_traffic.measure(host_run.module, direction, (batch, channels, side, side), dtype, layout)
        few = layout == "channels_last" and row.cuts[0]["blocks"] < 128 * row.cuts[0]["row_parts"]
        if row.traffic > MOST_TRAFFIC[direction, batch][few] or row.sectors > 1.15:
            wrong.append(row.markdown())
        if direction == "forward":
            assert row.traffic == pytest.approx(cuda_traffic.designed_forward(row), rel=1e-6), row.markdown()
    assert not wrong, "\n".join([cuda_traffic.HEADER, *wrong])


@pytest.mark.parametrize("dtype", cuda_traffic.DTYPES)
@image_layouts
def test_blocks_that_the_benchmark_counts_with(dtype, layout, host_run):
    shape = (16, 64, 64, 64)
    forward, backward = (cuda_traffic.measure(host_run.module, d, shape, dtype, layout) for d in ("forward", "backward"))
    threads, shared, wavefronts, traffic = cuda_static.BLOCKS["strips", dtype, layout]
    assert (threads, shared) == (forward.cuts[0]["threads"], forward.cuts[0]["shared_bytes"])
    assert (wavefronts, traffic) == pytest.approx((forward.wavefronts, forward.traffic), rel=0.01)
    for kernel, cut in zip(("inputs", "taps"), backward.cuts, strict=True):
        assert cuda_static.BLOCKS[kernel, dtype, layout] == (cut["threads"], cut["shared_bytes"])
    for kernel, direction in (("convolution", "forward"), ("gradients", "backward")):
        row = cuda_traffic.measure(host_run.module, direction, shape, dtype, layout, "dwconv_gelu")
        threads, shared, wavefronts, traffic = cuda_static.BLOCKS[kernel, dtype, layout]
        assert (threads, shared) == (row.cuts[0]["threads"], row.cuts[0]["shared_bytes"])
        assert (wavefronts, traffic) == pytest.approx((row.wavefronts, row.traffic), rel=0.01)
