"""From a recipe and a data set to a folder with the trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from . import distributed, recipes
from .begin import build, class_weights, require_same, resolved
from .data import open_dataset
from .data.augment import augmentation
from .data.pairs import Pairs
from .data.workers import report_dead_workers
from .evaluate import algorithms
from .loop import Loop, kernels_tuned
from .model import SegNeXt
from .recipes import Recipe, RecipeError, shown
from .run import last, open_run
from .trainer import Trainer, can_be_graphed
from .weights import from_about, load


@dataclass(frozen=True)
class Machine:
    """Where and with how many processes a training runs. But for what batch norms see of an accumulated batch, that does not
    change what it computes.

    Attributes:
        device: as PyTorch names it, cpu or cuda; under torchrun, every process has its own of that kind.
        workers: processes that read pictures, for each that trains.
        accumulate: into how many parts, one after another, each process' share of a batch is cut, where memory is short.
        cuda_graph: launch forward and backward as one on a GPU alone, which keeps the memory that they need.
    """

    device: str = "cpu"
    workers: int = 2
    accumulate: int = 1
    cuda_graph: bool = True


def train(
    stages: Sequence[Recipe],
    data: Sequence[str | Path],
    out: str | Path,
    machine: Machine,
) -> SegNeXt | None:
    """Runs a recipe's trainings one after another, each beginning with the weights of the one before.

    Args:
        stages: the trainings, as :func:`segnext.recipes.recipes` has them.
        data: the data sets' folders, one for each training, or one for all.
        out: folder for what :class:`segnext.run.Run` writes, and for ``recipe.json``, which holds what :func:`resume` needs; of
            several trainings each has its own folder in there.
        machine: where it runs, and with how many processes.

    Returns:
        The trained model, in evaluation mode; None in all processes but the first.

    Raises:
        RecipeError: it does not fit the data or the processes, or ``out`` holds a training already.
        DataError, ImageError: the data cannot be read, or there are not two classes in them.
        WeightsError: the encoder's weights cannot be had, or a checkpoint not be written; the one before is still there.
        FloatingPointError: the loss is no longer finite. Checkpoints are of before.
    """
    out, stages = Path(out), tuple(stages)
    roots = _roots(stages, data)
    with distributed.processes(machine.device) as device:
        if distributed.broadcast_object(_holds_training(out)):
            raise RecipeError(f"{out} holds a training already; go on with it by --resume {out}, or choose another --out")
        pairs = [open_dataset(stage.dataset, root, stage.train) for stage, root in zip(stages, roots, strict=True)]
        stages = tuple(resolved(stage, train, device) for stage, train in zip(stages, pairs, strict=True))

        def begin() -> None:
            recipes.write(out / "recipe.json", stages, data=list(map(str, roots)), machine=vars(machine))

        return _stages(stages, roots, out, device, machine, pairs, begin)


def _roots(stages: Sequence[Recipe], data: Sequence[str | Path]) -> list[Path]:
    roots = [Path(root).absolute() for root in data] * (len(stages) if len(data) == 1 else 1)
    if len(roots) != len(stages):
        raise RecipeError(
            f"the recipe is {len(stages)} trainings: give one folder of data for each, or one for all, not {len(data)}"
        )
    return roots


def _holds_training(out: Path) -> bool:
    """Whether a checkpoint is there, or in the folder of a training of several that began there."""
    folders = [out, *(out.glob("*/") if (out / "recipe.json").exists() else ())]
    return any((folder / name).exists() for folder in folders for name in ("last.pth", "model.pth"))


def resume(out: str | Path, data: Sequence[str | Path] = (), **machine) -> SegNeXt | None:
    """Goes on with a training that ended before its end, from its last checkpoint: with as many processes as before it ends
    with the same weights, to the bit, as if nothing had happened (on GPUs if the recipe is ``deterministic``).

    Args:
        out: the training's folder.
        data: where the data sets are now, as for :func:`train`; by default where they were.
        machine: what is to be otherwise than before: ``device``, ``workers``, ``accumulate``, ``cuda_graph``.

    Raises:
        RecipeError: the folder holds no training, or one that began with other classes or another model than the data and the
            recipe have now; and what :func:`train` raises.
    """
    out = Path(out)
    if not (out / "recipe.json").exists():
        raise RecipeError(f"{out} holds no training to go on with: there is no recipe.json")
    stages, beside = recipes.read(out / "recipe.json")
    if not {"data", "machine"} <= beside.keys():
        raise RecipeError(f"{out / 'recipe.json'} is a recipe, but not of a training that was begun")
    recipes.require_fields(Machine, beside["machine"], f"{out / 'recipe.json'}: a machine")
    machine = Machine(**{**beside["machine"], **machine})
    with distributed.processes(machine.device) as device:
        roots = _roots(stages, data or beside["data"])

        def begin() -> None:
            recipes.write(out / "recipe.json", stages, **{**beside, "data": list(map(str, roots))})

        return _stages(stages, roots, out, device, machine, begin=begin if data else None)


def _stages(
    stages: Sequence[Recipe],
    roots: Sequence[Path],
    out: Path,
    device: torch.device,
    machine: Machine,
    pairs: Sequence[Pairs] = (),
    begin: Callable[[], None] | None = None,
) -> SegNeXt | None:
    """``pairs``: what is trained on, if it is open already. ``begin``: called once no other process can have the folder."""
    before = None
    for i, (recipe, root) in enumerate(zip(stages, roots, strict=True)):
        folder = out if len(stages) == 1 else out / f"{i + 1}-{recipe.dataset}-{recipe.train}"
        finished = folder / "model.pth"
        if not distributed.broadcast_object(finished.exists()):
            data = pairs[i] if pairs else open_dataset(recipe.dataset, root, recipe.train)
            with algorithms(recipe.deterministic), kernels_tuned(not recipe.deterministic):
                _stage(recipe, data, root, folder, before, device, machine, begin)
            begin = None
        elif distributed.rank() == 0:
            on = f"; to train on from its weights: --weights {finished} --out ANOTHER" if i + 1 == len(stages) else ""
            print(f"{folder} is trained to its end{on}")
        distributed.barrier()
        before = finished
    return load(before) if distributed.rank() == 0 else None


def _stage(
    recipe: Recipe,
    pairs: Pairs,
    root: Path,
    folder: Path,
    before: Path | None,
    device: torch.device,
    machine: Machine,
    begin: Callable[[], None] | None = None,
) -> None:
    """One training from its beginning or its last checkpoint to its end."""
    val = None if recipe.val is None else open_dataset(recipe.dataset, root, recipe.val)
    state = last(folder)
    if state is not None:
        require_same(state, recipe, pairs, folder, root)
    with distributed.local_main_process_first():
        model = build(recipe, pairs, before) if state is None else from_about({**state["meta"], **shown(recipe)})
    with distributed.explain_out_of_memory(device, _ways(recipe, machine, device)):
        trainer = Trainer(
            model.to(device),
            pairs,
            recipe,
            augment=augmentation(recipe.crop, recipe.scale, recipe.ratio, recipe.max_share, recipe.distort),
            class_weights=class_weights(pairs, pairs.classes, recipe.balance, root, machine.workers)
            if recipe.balance or recipe.dataset == "folder"  # whose masks nobody has looked at
            else None,
            accumulate=machine.accumulate,
            workers=machine.workers,
            cuda_graph=machine.cuda_graph,
        )
        best, losses, due = -1.0, [], False
        if state is not None:
            trainer.load(state)
            best, losses, due = state["best"], state["losses"], state.get("due", False)
            del state  # as large as the model and both its moments
        if distributed.broadcast_object(trainer.done) != trainer.done:
            raise RecipeError(f"{folder} is not the same folder for all processes: all machines must share it")
        with report_dead_workers(), open_run(folder, trainer.done, due) if distributed.rank() == 0 else nullcontext() as run:
            if run is not None and begin is not None:
                begin()
            Loop(trainer, run, val, best, losses, due, machine.workers).train()


def _ways(recipe: Recipe, machine: Machine, device: torch.device) -> str:
    """How training takes less memory."""
    share = recipe.batch // distributed.world_size()
    parts = next((n for n in range(machine.accumulate + 1, share + 1) if share % n == 0), None)
    first = "a smaller --batch or --crop" if parts is None else f"--accumulate {parts}"
    return first + (", or --no-cuda-graph" if machine.cuda_graph and can_be_graphed(device) else "")
