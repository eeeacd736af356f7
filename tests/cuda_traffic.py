"""What the CUDA kernels move, counted on the host. ``python tests/cuda_traffic.py`` prints the table of csrc/cuda/README.md."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import cuda_run
import numpy as np

TAPS = {"msca_strips": [25, 1, 7, 1, 7, 1, 11, 1, 11, 1, 21, 1, 21, 1], "dwconv_gelu": [9, 1]}
DTYPES = {"float32": np.float32, "float16": np.float16}
# Elements for each output that the passes must read and write.
WORDS = {
    ("msca_strips", "forward"): 2,
    ("msca_strips", "backward"): 5,
    ("dwconv_gelu", "forward"): 2,
    ("dwconv_gelu", "backward"): 3,
}
T, B = {512: [(32, 128), (64, 64), (160, 32), (256, 16)]}, {512: [(64, 128), (128, 64), (320, 32), (512, 16)]}
T[1024], B[1024] = ([(channels, 2 * side) for channels, side in stages[512]] for stages in (T, B))


@dataclass(frozen=True)
class Row:
    """One pass over one stage. Bytes, sectors and shared wavefronts are those of every launch of the pass."""

    direction: str
    shape: tuple[int, int, int, int]
    dtype: str
    layout: str
    cuts: list[dict]
    traffic: float  # bytes that blocks ask of memory, part of what must be moved
    from_l2: float  # of that, what the L2 has from another block's reading
    sectors: float  # of 32 bytes, part of the bytes
    wavefronts: float  # of shared memory for 32 outputs
    conflicts: float  # part of them that bank conflicts add

    def markdown(self) -> str:
        n, c, h, w = self.shape
        blocks = " + ".join(f"{cut['blocks']} of {cut['threads']}" for cut in self.cuts)
        figures = f"{self.traffic:.2f} | {self.from_l2:.2f} | {self.sectors:.2f} | {self.wavefronts:.0f} | {self.conflicts:.2f}"
        return f"| {self.direction} | {n}x{c}x{h}x{w} | {self.dtype} | {self.layout} | {blocks} | {figures} |"


HEADER = """\
| pass | x | dtype | layout | blocks of threads | traffic | of it L2 | sectors | wavefronts | conflicts |
|---|---|---|---|---|---|---|---|---|---|"""


def new(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Memory that nobody has touched, aligned as a GPU's is."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 256, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + size].view(dtype).reshape(shape)


def measure(
    module: ModuleType,
    direction: str,
    shape: tuple[int, int, int, int],
    dtype: str,
    layout: str,
    operator: str = "msca_strips",
) -> Row:
    """Runs the blocks of one group of channels, in the first images that a block does, of a launch for the whole shape."""
    n, c, h, w = shape
    last, kind = layout == "channels_last", DTYPES[dtype]
    images = [new((n, h, w, c) if last else shape, kind) for _ in range(4)]
    filters, grads = ([new((c, taps), kind) for taps in TAPS[operator]] for _ in range(2))

    def call():
        if direction == "forward":
            getattr(module, operator)(images[0], filters, images[1], last)
        else:
            getattr(module, f"{operator}_backward")(images[2], images[0], filters, images[3], grads, last)

    module.settings(count=0)
    call()
    cuts, size = module.cuts(), np.dtype(kind).itemsize
    total = dict.fromkeys(("read_bytes", "written_bytes", "sectors", "distinct", "wavefronts", "ideal"), 0.0)
    for number, cut in enumerate(cuts):
        module.settings(step=cut["groups"], count=cut["column_tiles"] * cut["row_parts"], launch=number, traced=True)
        call()
        outputs = min(cut["channels"], c) * h * w * min(cut["block_images"], n)
        counted = module.traffic()
        for key, value in {
            "read_bytes": counted["read_bytes"] / size,
            "written_bytes": counted["written_bytes"] / size,
            "sectors": (counted["read_sectors"] + counted["written_sectors"]) * 32 / size,
            "distinct": counted["distinct_read_sectors"] * 32 / size,
            "wavefronts": counted["shared_wavefronts"] * 32,
            "ideal": counted["shared_ideal"] * 32,
        }.items():
            total[key] += value / outputs
    moved, must = total["read_bytes"] + total["written_bytes"], WORDS[operator, direction]
    return Row(
        direction,
        shape,
        dtype,
        layout,
        cuts,
        traffic=moved / must,
        from_l2=max(total["read_bytes"] - total["distinct"], 0) / must,
        sectors=total["sectors"] / moved,
        wavefronts=total["wavefronts"],
        conflicts=1 - total["ideal"] / total["wavefronts"],
    )


def designed_forward(row: Row) -> float:
    """What csrc/cuda/README.md says that forward moves, over what must be moved: tiles with their halo, taps for each block."""
    (_, _, height, width), (cut,) = row.shape, row.cuts
    unit, halo, reach = 16 // np.dtype(DTYPES[row.dtype]).itemsize, 12, 10
    columns = rows = 0
    for first in range(0, width, cut["columns"]):
        begin, end = max(first - halo, 0), min(first + cut["columns"] + halo, width)
        columns += -(-end // unit) * unit - begin // unit * unit if row.layout == "contiguous" else end - begin
    for first in range(0, height, cut["rows"]):
        start = first - reach if first else -2  # of a's rows, in steps of 4; x is read from 2 above to 5 below
        last = min(min(first + cut["rows"], height) + reach, height) - 1
        rows += min(start + (last - start) // 4 * 4 + 5, height - 1) + 1 - max(start - 2, 0)
    blocks = cut["column_tiles"] * cut["row_parts"] / min(cut["block_images"], row.shape[0])
    return (columns * rows / (height * width) + 1 + sum(TAPS["msca_strips"]) * blocks / (height * width)) / 2


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        module = cuda_run.load(cuda_run.build(Path(folder)))
        print(HEADER)
        for batch, direction in ((16, "forward"), (1, "forward"), (16, "backward")):
            for channels, side in T[512]:
                for dtype in DTYPES:
                    for layout in ("contiguous", "channels_last"):
                        print(measure(module, direction, (batch, channels, side, side), dtype, layout).markdown(), flush=True)


if __name__ == "__main__":
    main()
