"""What the compiler made of the CUDA kernels, read from the library that was built: ``python -m bench cuda-static``.

Registers and local memory of every kernel for every architecture, the warps that a multiprocessor holds, the mix of
instructions, and what bounds msca_strips forward and dwconv_gelu on two GPUs.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import segnext_kernels

LAYOUTS = {"0": "contiguous", "1": "channels_last", "": ""}
TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
INNER = 50  # multiply-adds that make a loop one of the inner ones

# A block's threads and bytes of shared memory for 16x64x64x64, and the wavefronts of shared memory for 32 outputs and what is
# moved over what must be, as tests/cuda_traffic.py counts them; a test keeps them true.
BLOCKS = {
    ("strips", "float32", "contiguous"): (128, 31360, 29.1, 1.01),
    ("strips", "float32", "channels_last"): (256, 60032, 28.0, 1.01),
    ("strips", "float16", "contiguous"): (128, 26496, 27.1, 1.01),
    ("strips", "float16", "channels_last"): (512, 107520, 37.3, 1.21),
    ("inputs", "float32", "contiguous"): (128, 32000),
    ("inputs", "float32", "channels_last"): (256, 61184),
    ("inputs", "float16", "contiguous"): (128, 29952),
    ("inputs", "float16", "channels_last"): (288, 62208),
    ("taps", "float32", "contiguous"): (128, 35520),
    ("taps", "float32", "channels_last"): (256, 68480),
    ("taps", "float16", "contiguous"): (128, 30656),
    ("taps", "float16", "channels_last"): (256, 75008),
    ("convolution", "float32", "contiguous"): (128, 29952, 8.3, 1.07),
    ("convolution", "float32", "channels_last"): (128, 38784, 10.3, 1.07),
    ("convolution", "float16", "contiguous"): (128, 30464, 9.4, 1.07),
    ("convolution", "float16", "channels_last"): (256, 67072, 11.4, 1.07),
    ("gradients", "float32", "contiguous"): (128, 67088, 23.8, 1.13),
    ("gradients", "float32", "channels_last"): (128, 66064, 25.8, 1.13),
    ("gradients", "float16", "contiguous"): (128, 63504, 25.1, 1.13),
    ("gradients", "float16", "channels_last"): (256, 112912, 27.0, 1.13),
}
# Multiply-adds for an output, those of GELU too, and the outputs of a thread in a step down the rows.
MULTIPLY_ADDS = {"strips": 103, "convolution": 9 + 9, "gradients": 3 * 9 + 10}
TITLES = {"strips": "msca_strips forward", "convolution": "dwconv_gelu forward", "gradients": "dwconv_gelu backward"}
OUTPUTS = {"strips": 8, "convolution": 16, "gradients": 16}


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second
    lanes: int  # warps whose float32 multiply-adds a multiprocessor finishes in a cycle


GPUS = (
    Gpu("H100 SXM", "sm_90", 132, 1.755e9, 3.35e12, 4),
    Gpu("A100 SXM 80 GB", "sm_80", 108, 1.41e9, 2.04e12, 2),
)


@dataclass
class Kernel:
    name: str
    dtype: str
    layout: str
    arch: str
    registers: int
    local: int  # bytes of stack and local memory: 0 without spills
    instructions: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @cached_property
    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of every loop, the outer ones last."""
        found = []
        for last, text in enumerate(self.instructions):
            target = re.search(r"BRA.*`\((\.L\S+)\)", text)
            if target and self.labels.get(target[1], last + 1) <= last:
                found.append((self.labels[target[1]], last))
        return sorted(set(found), key=lambda loop: loop[1] - loop[0])

    def own(self, loop: tuple[int, int]) -> Counter:
        """The instructions of a loop without those of the loops in it."""
        inner = [other for other in self.loops if loop[0] <= other[0] and other[1] <= loop[1] and other != loop]
        body = (i for i in range(loop[0], loop[1] + 1) if not any(a <= i <= b for a, b in inner))
        return Counter(opcode(self.instructions[i]) for i in body)

    def inner_loops(self) -> list[Counter]:
        return [own for own in map(self.own, self.loops) if multiply_adds(own) >= INNER]


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def count(own: Counter, *prefixes: str) -> int:
    return sum(n for name, n in own.items() if name.startswith(prefixes))


def multiply_adds(own: Counter) -> int:
    return count(own, "FFMA")


def useful_share(own: Counter) -> float:
    return multiply_adds(own) / own.total()


def library() -> Path | None:
    spec = importlib.util.find_spec("segnext_kernels._C_cuda")
    return Path(spec.origin) if spec else None


def tool(name: str) -> str:
    """A tool of CUDA's, from PATH or from Triton's package."""
    if found := shutil.which(name):
        return found
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec else None
    if bundled and bundled.exists():
        return str(bundled)
    raise ValueError(f"there is no {name}: put CUDA's on PATH, or install triton")


def kernels(binary: Path) -> list[Kernel]:
    """Every kernel in a library, for every architecture that it was compiled for."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([tool("cuobjdump"), "-xelf", "all", binary.resolve()], cwd=folder, check=True, capture_output=True)
        found = []
        for cubin in sorted(Path(folder).glob("*.cubin")):
            found += _read(cubin)
    return sorted(found, key=lambda k: (k.name, k.dtype, k.layout, int(k.arch[3:])))


def resources(cubin: Path) -> list[tuple[str, int, int]]:
    """Of every kernel in a cubin its symbol, the registers of a thread, and its bytes of stack and local memory: spills."""
    command = [tool("cuobjdump"), "--dump-resource-usage", cubin]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"Function (\S+):\n\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", printed)
    return [(symbol, int(registers), int(stack) + int(local)) for symbol, registers, stack, local in found]


def _read(cubin: Path) -> list[Kernel]:
    arch = re.search(r"sm_\d+", cubin.name)[0]
    found = {}
    for symbol, registers, local in resources(cubin):
        name, dtype, layout = re.search(r"\d+([a-z]+)I(f|6__half|13__nv_bfloat16)(?:Lb(\d))?", symbol).groups()
        found[symbol] = Kernel(name, TYPES[dtype], LAYOUTS[layout or ""], arch, registers, local)
    text = subprocess.run([tool("nvdisasm"), "-c", "-ndf", cubin], check=True, capture_output=True, text=True).stdout
    kernel = None
    for line in text.splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            kernel = found.get(section[1])
        elif kernel and (label := re.match(r"(\.L\S+):", line)):
            kernel.labels[label[1]] = len(kernel.instructions)
        elif kernel and (instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)):
            kernel.instructions.append(instruction[1])
    return list(found.values())


def occupancy(kernel: Kernel) -> float | None:
    """The part of a multiprocessor's warps that can be resident, for a block of 16x64x64x64.

    None for the other kernels, without cuxray, and where that block has too much shared memory for the
    architecture: there the kernel takes smaller tiles.
    """
    block = BLOCKS.get((kernel.name, "float16" if kernel.dtype == "bfloat16" else kernel.dtype, kernel.layout))
    if block is None or importlib.util.find_spec("cuxray") is None:
        return None
    from cuxray import archspec
    from cuxray import occupancy as rules

    spec = archspec.lookup(kernel.arch)
    found = rules.compute(spec, kernel.registers, block[0], 0, block[1])
    return found.occupancy_pct / 100 if found.blocks_per_sm else None


def instructions_of_output(kernel: Kernel) -> float:
    """Issued by a warp for 32 outputs, at most: branches that are not taken count too."""
    loops = kernel.loops
    main = max((loop for loop in loops if multiply_adds(kernel.own(loop)) > 4 * INNER), key=lambda loop: loop[1] - loop[0])
    outputs = OUTPUTS[kernel.name]
    units = outputs / (4 if kernel.dtype == "float32" else 8)  # of 16 bytes
    total = kernel.own(main).total()
    for loop in loops:
        own = kernel.own(loop)
        if loop == main or not (main[0] <= loop[0] and loop[1] <= main[1]):
            continue
        if multiply_adds(own) >= INNER:
            total += own.total()  # a task for each thread
        elif count(own, "LDGSTS", "STG.E.128") or (count(own, "LDS.128") and count(own, "STS")):
            total += units * own.total()  # the others move single elements, where memory is not aligned
    return total / outputs


def bounds(kernel: Kernel, gpu: Gpu) -> dict[str, float]:
    """Cycles of a multiprocessor for 32 outputs, by what they are spent on."""
    _, _, wavefronts, traffic = BLOCKS[kernel.name, kernel.dtype, kernel.layout]
    elements = 3 if kernel.name == "gradients" else 2
    moved = elements * (4 if kernel.dtype == "float32" else 2) * traffic * 32
    return {
        "multiply-adds": MULTIPLY_ADDS[kernel.name] / gpu.lanes,
        "issue": instructions_of_output(kernel) / 4,
        "shared memory": wavefronts,
        "DRAM": moved / (gpu.bandwidth / gpu.multiprocessors / gpu.clock),
    }


def table_row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def markdown(found: list[Kernel]) -> str:
    facts = segnext_kernels.build_info()["cuda_architectures"]
    lines = [f"# CUDA kernels, compiled for {', '.join(facts)}", "", "## Resources", ""]
    columns = ("kernel", "dtype", "layout", "arch", "registers", "local bytes", "occupancy", "FFMA share of inner loops")
    lines += table_row(*columns, "LDS of 128, 64, 32 bits", "from memory, 128 bits and less"), "|" + "---|" * 10
    for k in found:
        warps, all_of_it = occupancy(k), Counter(map(opcode, k.instructions))
        shares = ", ".join(f"{useful_share(own):.2f}" for own in k.inner_loops())
        wide, half = count(all_of_it, "LDS.128"), count(all_of_it, "LDS.64")
        shared = f"{wide}, {half}, {count(all_of_it, 'LDS') - wide - half}"
        whole = count(all_of_it, "LDG.E.128", "LDGSTS")  # asynchronous copies are of 128 bits
        memory = f"{whole}, {count(all_of_it, 'LDG') - whole}"
        part = "" if warps is None else f"{warps:.2f}"
        lines.append(table_row(k.name, k.dtype, k.layout, k.arch, k.registers, k.local, part, shares, shared, memory))
    for name, title in TITLES.items():
        lines += ["", f"## What bounds {title}: cycles of a multiprocessor for 32 outputs", ""]
        lines += [
            "| GPU | dtype | layout | multiply-adds | issue, at most | shared memory | DRAM | bound | useful part of it |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for gpu, k in itertools.product(GPUS, found):
            if k.arch != gpu.arch or (k.name, k.dtype, k.layout) not in BLOCKS or k.name != name:
                continue
            cycles = bounds(k, gpu)
            bound = max(cycles, key=cycles.get)
            useful = (cycles["DRAM"] if bound == "DRAM" else cycles["multiply-adds"]) / cycles[bound]
            lines.append(table_row(gpu.name, k.dtype, k.layout, *(f"{c:.1f}" for c in cycles.values()), bound, f"{useful:.2f}"))
    return "\n".join(lines)
