"""How nmf in Triton is cut into programs, and its steps, which forward and backward both do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from .. import _triton
from .._triton import ceil_div, config, launch, power_of_2, wrap_triton
from ._forward import finish, step

WARPS = 1024  # that fill a GPU
LEAST_PARTS = 4  # programs for one matrix, however many matrices there are
PART = 64  # columns of a program are a multiple of this, and of every configuration's tile
HELD = 256  # rows of a tile of x and of sums that a program holds in registers, if the rank is at most 16


@dataclass(frozen=True)
class Problem:
    """The sizes of a decomposition and how it is cut."""

    batch: int
    rows: int
    columns: int
    rank: int
    precision: str
    most_held: int = HELD
    large: bool = False  # whether the GPU has room for larger tiles
    lean: bool = False  # whether two warps can hold a tile and the sums

    @staticmethod
    def of(x: Tensor, bases: Tensor, round_factors: bool = False) -> Problem:
        batch, rows, columns = x.shape
        rounded = round_factors and x.dtype == torch.bfloat16 and _precision(x) == "split"
        precision = "rounded" if rounded else _precision(x)
        return Problem(batch, int(rows), columns, int(bases.shape[2]), precision, _most_held(x), _large(x), _lean(x))

    @cached_property
    def part(self) -> int:
        """Columns of a program."""
        tiles = ceil_div(self.columns, PART)
        return PART * ceil_div(tiles, max(LEAST_PARTS, ceil_div(self.programs, self.batch)))

    @cached_property
    def programs(self) -> int:
        """Of a step. Each adds up sums of its own, which for a high rank are as large as the columns it reads."""
        if self.rank > 16 or self.held or self.precision in ("split", "rounded"):
            return self.together
        return max(WARPS // 2, 2 * self.together)  # what is read again shall still be in the L2

    @property
    def together(self) -> int:
        """Programs that run at the same time."""
        return WARPS // self.warps

    @cached_property
    def parts(self) -> int:
        return ceil_div(self.columns, self.part)

    @cached_property
    def of_factors(self) -> dict[str, object]:
        """The constants of every kernel."""
        return {"rank": self.rank, "RANK": power_of_2(self.rank, at_least=16), "PRECISION": self.precision}

    @cached_property
    def constants(self) -> dict[str, object]:
        """Those of the kernels that read x."""
        wide = self.precision in ("split", "rounded") and self.rank <= 64 < self.rows  # one chunk would be unrolled
        chunk = min(power_of_2(self.rows, at_least=16), 64 if wide else 32)
        sizes = {"rows": self.rows, "columns": self.columns, "blocks": self.blocks}
        return self.of_factors | sizes | {"ROWS": chunk, "CHUNKS": ceil_div(self.rows, chunk)}

    @cached_property
    def held(self) -> bool:
        """Whether a program of a step holds its tile of x and the sums in registers; TF32 leaves too few."""
        return self.rank <= 16 and self.rows <= self.most_held and self.precision not in ("tf32", "tf32x3")

    @cached_property
    def stages(self) -> int:
        """Of loads in the loops that go over x: they come while products are made, where there is room for that."""
        return 1 if self.rank > 64 or torch.version.hip is not None else 3

    @cached_property
    def blocks(self) -> int:
        return ceil_div(self.rows, self.block)

    @property
    def block(self) -> int:
        """Rows of a program that finishes a step."""
        return 16 if self.rank > 64 else 32

    @property
    def widest_tile(self) -> int:
        return 16 if self.rank > 64 and torch.version.hip is not None else 32

    @cached_property
    def warps(self) -> int:
        """So few that each has products of its own, where registers allow, and many programs share a multiprocessor.

        An H100 told: a product of 32 x 16 has two for each of two warps, and eight would do every one four times.
        """
        if self.rank > 64 or self.precision == "ieee" or (self.held and not self.lean):
            return 8
        return 2 if self.rank <= 16 else 4

    # Beyond these, one target's compiler or another's keeps something in memory instead of registers.

    @cached_property
    def configs(self) -> list[triton.Config]:
        """Of ``step``."""
        small = 16 < self.rank <= 32 and self.rows <= 64  # the compiler unrolls the only chunk
        if self.held and self.lean:
            return self.tiles(32)
        if self.held:  # a limit makes ptxas spill when this much is held, and saves it from that otherwise
            few = self.rows <= 64 or (self.precision != "ieee" and self.rows <= 128)
            columns = 16 if few and self.rows > 64 else 32
            return self.tiles(columns, limit=255 if few else None)
        if small:
            return self.tiles(16)
        limit = 255 if self.rank <= 64 else None
        return self.tiles(*((64,) if self.wide_tiles else ()), self.widest_tile, limit=limit)

    @cached_property
    def configs_of_output(self) -> list[triton.Config]:
        """Of ``approximate``."""
        wide = (64,) if self.wide_tiles and torch.version.hip is None else ()
        return self.tiles(*wide, *(columns for columns in (32, 16) if columns <= self.widest_tile))

    @cached_property
    def wide_tiles(self) -> bool:
        """Of 64 columns, with half as many reads of the bases."""
        return self.large and not self.held and self.rank <= 64

    def tiles(self, *columns: int, limit: int | None = 255) -> list[triton.Config]:
        return [config(max(self.warps, each // 16), registers=limit, COLUMNS=each, STAGES=self.stages) for each in columns]

    @cached_property
    def configs_backward(self) -> list[triton.Config]:
        """Of ``step_backward``."""
        narrow = self.rank > 16 or self.constants["CHUNKS"] == 1
        if self.rank > 16 and self.constants["CHUNKS"] <= 4:  # a short loop, which is unrolled
            return [config(8, registers=255, COLUMNS=16, STAGES=self.stages)]
        stages = min(self.stages, 2) if self.warps == 2 else self.stages
        return [config(self.warps, registers=255, COLUMNS=16 if narrow else 32, STAGES=stages)]

    @cached_property
    def configs_of_tiles(self) -> list[triton.Config]:
        """Of ``gradient_of_x``."""
        return [config(self.warps, registers=255, ROWS=32, COLUMNS=columns) for columns in (64, 32)]

    @cached_property
    def configs_of_blocks(self) -> list[triton.Config]:
        """Of ``finish`` and ``finish_backward``."""
        return [config(8 if self.rank > 64 else 4, registers=255, ROWS=self.block)]

    def grid(self, meta: dict[str, int]) -> tuple[int, int]:
        return self.batch, self.parts

    def grid_of_tiles(self, meta: dict[str, int]) -> tuple[int]:
        return (self.batch * ceil_div(self.rows, meta["ROWS"]) * ceil_div(self.columns, meta["COLUMNS"]),)

    def grid_of_blocks(self, meta: dict[str, int]) -> tuple[int, int]:
        return self.batch, self.blocks


def _precision(x: Tensor) -> str:
    """How matrix products are done: of 16-bit x on tensor cores without loss, of float32 as torch's setting allows.

    AMD's matrix cores have float32 itself. NVIDIA's make it of three products of TF32, which on an H100 was nearer to float64
    than float32's own arithmetic, whose sums are longer, and faster.
    """
    if torch.version.hip is not None:
        return "ieee"
    if x.dtype != torch.float32:
        return "split"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _most_held(x: Tensor) -> int:
    """On NVIDIA's GPUs after sm_8x few warps are faster, and read a tile again from the caches, which are larger."""
    return HELD if torch.version.hip is not None or _triton.capability(x)[0] == 8 else 0


def _large(x: Tensor) -> bool:
    """Whether there is room for tiles of 64 columns: with AMD's threads of twice the registers, and with the tensor cores of
    sm_90 and sm_100, which read shared memory."""
    return torch.version.hip is not None or (_precision(x) == "split" and _triton.capability(x)[0] in (9, 10))


def _lean(x: Tensor) -> bool:
    return torch.version.hip is None and x.dtype == torch.bfloat16


@dataclass
class Factors:
    """The factors of the last step, or of all of them, first dimension the step."""

    coef: Tensor  # [steps + 2 or 1, B, N, R]; backward finds the last ones
    bases: Tensor  # [steps + 1 or 1, B, D, R]
    grams: Tensor  # [steps + 1 or 1, B, blocks, R, R], whose sums are B^T B
    scratch: Tensor  # [B, 2 programs, R, R], in which a program passes squares between its threads
    products: Tensor  # [steps or 1, B, D, R], x C
    squares: Tensor  # [steps or 1, B, parts, R, R], whose sums are C^T C


def run(problem: Problem, x: Tensor, bases: Tensor, steps: int, keep: bool) -> Factors:
    """All steps but the last update of the coefficients; with ``keep`` the factors of all steps are kept."""
    p, stored = problem, steps if keep else 0
    factors = Factors(
        *(
            bases.new_empty(shape)
            for shape in (
                (stored + 2 if keep else 1, p.batch, p.columns, p.rank),
                (stored + 1, p.batch, p.rows, p.rank),
                (stored + 1, p.batch, p.blocks, p.rank, p.rank),
                (p.batch, 2 * max(p.parts, p.blocks), p.rank, p.rank),
                (max(stored, 1), p.batch, p.rows, p.rank),
                (max(stored, 1), p.batch, p.parts, p.rank, p.rank),
            )
        )
    )
    sums = bases.new_empty((p.batch, p.parts, p.rows, p.rank))
    _finish(p, bases, sums, factors, 0, FIRST=True, KEEP=keep)
    for i in range(steps):
        read, write = (i, i + 1) if keep else (0, 0)
        launch(
            wrap_triton(step),
            p.grid,
            x,
            factors.coef,
            factors.bases,
            factors.grams,
            sums,
            factors.squares,
            factors.scratch,
            read,
            write,
            p.batch,
            p.part,
            *x.stride(),
            **p.constants,
            HELD=p.held,
            FIRST=i == 0,
            configs=p.configs,
            key=("rows", "rank", "part"),
            restore=("coef",),
        )
        _finish(p, bases, sums, factors, read, FIRST=False, KEEP=keep)
    return factors


def _finish(p: Problem, bases: Tensor, sums: Tensor, factors: Factors, slot: int, **constants: bool) -> None:
    launch(
        wrap_triton(finish),
        p.grid_of_blocks,
        bases,
        sums,
        factors.squares,
        factors.bases,
        factors.grams,
        factors.products,
        factors.scratch,
        slot,
        p.batch,
        p.rows,
        p.parts,
        **p.of_factors,
        **constants,
        configs=p.configs_of_blocks,
    )
