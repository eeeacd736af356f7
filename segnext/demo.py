"""Trains a SegNeXt from scratch, on drawn scenes or on a folder of photographs, and shows it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2

import segnext_kernels

from .begin import class_weights
from .checkpoint import check_folder
from .data import Memory, Scenes, open_dataset
from .data.augment import augmentation
from .evaluate import Scores, evaluate, table
from .images import write_png
from .loop import fit
from .model import create
from .palette import Colour, comparison, legend, photo_image
from .predict import segment
from .recipes import RECIPES
from .weights import save

(SCRATCH,) = RECIPES["scratch"]
SCENES_SECONDS, PHOTOS_SECONDS = 120, 180
SCENES_LR = 3e-3
SCENE_SIZE, PHOTO_SIZE = (128, 160), (180, 240)
TRAINING_SCENES, COUNTED_SCENES, HELD_OUT_SCENES = 1500, 200, 100
CROP = 0.8  # of the photographs' height and width, down to a multiple of 32
PICTURES = 8


@dataclass(frozen=True)
class Task:
    """What the demo trains on, and where the pictures are that one can try the result on."""

    description: str
    classes: list[str]
    palette: list[Colour]
    train: Dataset
    held_out: Dataset
    names: Sequence[str]
    augment: Callable | None
    weights: torch.Tensor
    lr: float
    seconds: float
    examples: Path
    scale: tuple[int, int]


def demo(
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    size: str = "t",
    head: str = "ham",
    image_size: tuple[int, int] | None = None,
    seconds: float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[Scores, Scores]:
    """Trains from random weights, prints how good the model is on held-out pictures before and after, and writes into ``out``:
    held_out/ (picture, truth and prediction side by side; those of an earlier run are replaced), the checkpoint
    segnext-SIZE.pth and, of drawn scenes, scenes/.

    Args:
        out: folder; None for ``demo``, and with ``data`` for a folder of its name in there.
        data: a folder as :func:`segnext.data.folder.folder` takes it, with the splits train and val; None draws scenes.
        size, head: as in :func:`segnext.create`.
        image_size: (height, width) of the scenes; photographs keep their shape and are resized to the smaller of the two.
        seconds: of training; None for 120 with scenes and 180 with photographs.
        seed: of the weights, the order of the pictures and the augmentation.

    Returns:
        The scores on the held-out pictures before and after training.
    """
    out, device = Path(out or Path("demo", Path(data).resolve().name if data else "")), torch.device(device)
    torch.manual_seed(seed)
    task = _photographs(Path(data), image_size or PHOTO_SIZE) if data else _scenes(out, image_size or SCENE_SIZE)
    seconds = task.seconds if seconds is None else seconds
    recipe = replace(SCRATCH, iterations=None, seconds=seconds, lr=task.lr, seed=seed)
    model = create(size, len(task.classes), head, drop_path=0.0).to(device)
    model.classes, model.palette, model.scale = task.classes, task.palette, task.scale
    check_folder(out / "held_out")

    print(task.description)
    print(_machine(model, f"SegNeXt-{size.upper()}", seconds, device), flush=True)
    before = evaluate(model, task.held_out, len(task.classes))
    print(f"before training: {before} on {len(task.held_out)} held-out pictures", flush=True)
    losses = fit(model, task.train, recipe, augment=task.augment, class_weights=task.weights.to(device))
    after = evaluate(model, task.held_out, len(task.classes))
    print(f"after {len(losses)} steps: {after} on {len(task.held_out)} held-out pictures")
    print(table(task.classes, {"IoU before": before.iou, "after": after.iou}))

    checkpoint = out / f"segnext-{size}.pth"
    save(model, checkpoint)
    _write_pictures(model, task, out / "held_out")
    print(f"wrote {checkpoint} and, with picture, truth and prediction side by side, {out / 'held_out'}{os.sep}")
    print("try next: " + _predict_command(task, checkpoint, out / "predicted"))
    return before, after


def _scenes(out: Path, size: tuple[int, int]) -> Task:
    train, held_out, folder = Scenes(TRAINING_SCENES, size), Scenes(HELD_OUT_SCENES, size, seed=1), out / "scenes"
    check_folder(folder)
    names = [f"scene_{i}" for i in range(HELD_OUT_SCENES)]
    for i in _shown(held_out):
        write_png(photo_image(held_out[i][0]), folder / f"{names[i]}.png")
    return Task(
        description=f"The scenes are drawn by this program, they are no photographs: {len(Scenes.classes)} classes,"
        f" {size[0]}x{size[1]} pixels.",
        classes=Scenes.classes,
        palette=Scenes.palette,
        train=train,
        held_out=held_out,
        names=names,
        augment=v2.RandomHorizontalFlip(),
        weights=class_weights(Subset(train, range(COUNTED_SCENES)), Scenes.classes, SCRATCH.balance, "the scenes"),
        lr=SCENES_LR,
        seconds=SCENES_SECONDS,
        examples=folder,
        scale=(4 * min(size), min(size)),
    )


def _photographs(folder: Path, size: tuple[int, int]) -> Task:
    files = [open_dataset("folder", folder, split) for split in ("train", "val")]
    train, held_out = (Memory(pairs, min(size)) for pairs in files)
    crop = tuple(max(32, int(n * CROP) // 32 * 32) for n in size)
    return Task(
        description=f"Photographs in {folder}: {len(train)} for training, {len(held_out)} held out,"
        f" {len(train.classes)} classes, {min(size)} pixels on the short side.",
        classes=train.classes,
        palette=train.palette,
        train=train,
        held_out=held_out,
        names=held_out.names,
        augment=augmentation(crop, (sys.maxsize, min(size)), SCRATCH.ratio, SCRATCH.max_share),
        weights=class_weights(train, train.classes, SCRATCH.balance, folder),
        lr=SCRATCH.lr,
        seconds=PHOTOS_SECONDS,
        examples=Path(files[1].files[0][0]).parent,
        scale=(4 * min(size), min(size)),
    )


def _machine(model: nn.Module, name: str, seconds: float, device: torch.device) -> str:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    answers = segnext_kernels.explain("msca_strips", torch.empty(0, device=device))
    backend = next(name for name, answer in answers.items() if answer == "serves")
    operators = {
        "cpu": f"{torch.get_num_threads()} threads, fused kernels for {segnext_kernels.build_info()['isa']}",
        "reference": "operators in plain PyTorch",
    }.get(backend, f"fused kernels of the backend {backend}")
    return f"{name}, {millions:.1f} M parameters, random weights; {seconds:g} s of training on {device}, {operators}."


def _write_pictures(model: nn.Module, task: Task, folder: Path) -> None:
    key = legend(task.classes, task.palette, columns=5)
    for name in task.names:  # those of before; another's files stay
        (folder / f"{name}.png").unlink(missing_ok=True)
    for i in _shown(task.held_out):
        image, truth = task.held_out[i]
        sheet = comparison(image, truth, segment(model, image, 0), task.palette, key, scale=2)
        write_png(sheet, folder / f"{task.names[i]}.png")


def _shown(held_out: Dataset) -> range:
    """The numbers of the held-out pictures that are written, evenly spaced."""
    return range(0, len(held_out), -(-len(held_out) // PICTURES))


def _predict_command(task: Task, checkpoint: Path, out: Path) -> str:
    program = ["segnext"] if shutil.which("segnext") else [os.path.relpath(sys.executable), "-m", "segnext"]
    arguments = ["predict", task.examples, "--weights", checkpoint, "--out", out]
    return shlex.join(map(str, program + arguments))
