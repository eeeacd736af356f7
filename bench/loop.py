"""What training and evaluating cost beside the model: waiting for pictures, moving them, counting, each as a share."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from segnext.data import Memory, Pairs, Scenes, open_dataset
from segnext.data.augment import augmentation
from segnext.evaluate import evaluate, view_of
from segnext.fuse import inference_model
from segnext.model import create
from segnext.palette import photo_image
from segnext.recipes import RECIPES, Recipe
from segnext.trainer import Trainer
from segnext.views import View
from segnext_kernels import upsample_argmax, upsample_cross_entropy

from . import output
from .environment import environment, heading

CROP, SIZE, PICTURES = (512, 512), (512, 683), 24
WORKERS = (0, 1, 2)


def run(rounds: int, crop: tuple[int, int] = CROP, size: tuple[int, int] = SIZE, pictures: int = PICTURES) -> Iterator[dict]:
    """SegNeXt-T by the recipe ade20k, but for the crop and two pictures in a step, on JPEG files of drawn scenes.

    Yields:
        The environment and the rows so far, after each one: what was timed, seconds, and as parts of them the waiting for
        pictures and what comes beside the model.
    """
    (recipe,) = RECIPES["ade20k"]
    recipe = replace(recipe, crop=crop, scale=(4 * min(crop), min(crop)), batch=2, iterations=2 * rounds + 1, warmup=0)
    figures = {"environment": environment(), "missing_peers": {}, "rows": []}
    with _folder(size, pictures) as root:
        train, val = (open_dataset("folder", root, split) for split in ("train", "val"))
        for dtype, workers in itertools.product(("float32", "bfloat16"), WORKERS):
            timed = _training(train, replace(recipe, precision=dtype), workers, rounds)
            figures["rows"].append({"what": f"training, {dtype}, {workers} workers", **timed})
            yield figures
        for workers in WORKERS:
            timed = _evaluation(val, view_of(recipe), workers, max(3, rounds // 4))
            figures["rows"].append({"what": f"evaluation, {workers} workers", **timed})
            yield figures


def markdown(figures: dict) -> str:
    header = ["", "ms", "waiting for pictures", "beside the model"]
    lines = [
        [
            r["what"],
            output.short(1e3 * r["seconds"]),
            *("" if part is None else f"{part:.1%}" for part in (r["waited"], r["beside"])),
        ]
        for r in figures["rows"]
    ]
    return "\n\n".join([*heading(figures), output.table(header, lines)])


def _training(pairs: Pairs, recipe: Recipe, workers: int, rounds: int) -> dict[str, float | None]:
    """A step of the loop, and in turns the same model's forward, loss, backward and optimizer on a batch that is ready."""
    model = create("t", 150)
    trainer = Trainer(model, pairs, recipe, augment=augmentation(recipe.crop, recipe.scale), workers=workers)
    images = torch.randn(2, 3, *recipe.crop).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(2, *recipe.crop, dtype=torch.int64)
    with contextlib.closing(trainer.steps()) as steps:
        next(steps)
        in_a_row = [next(steps) for _ in range(rounds)]  # while nothing else gives the workers time
        ratios = []
        for _ in range(rounds):
            bare, step = _timed(lambda: _bare(trainer, images, labels)), next(steps)
            ratios.append((step.seconds - step.waited) / bare - 1)
    seconds = [step.seconds for step in in_a_row]
    waited = sum(step.waited for step in in_a_row) / sum(seconds)
    return {"seconds": statistics.median(seconds), "waited": waited, "beside": statistics.median(ratios)}


def _bare(trainer: Trainer, images: Tensor, labels: Tensor) -> None:
    trainer.model.train()
    with torch.autocast("cpu", trainer.dtype, enabled=trainer.dtype is not None):
        logits = trainer.model(images)
    upsample_cross_entropy(logits, labels).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def _evaluation(pairs: Pairs, view: View, workers: int, rounds: int) -> dict[str, float | None]:
    """All pictures from files, and in turns the model alone on as many that are read, resized and normalised."""
    model = inference_model(create("t", len(pairs.classes)), torch.device("cpu"))
    sizes = [tuple(image.shape[-2:]) for image, _ in Memory(pairs)]
    ready = {size: torch.randn(1, 3, *view.size(size)).contiguous(memory_format=torch.channels_last) for size in sizes}

    def bare() -> None:
        with torch.inference_mode():
            for size in sizes:
                upsample_argmax(model(ready[size]), size)

    whole, alone = [], []
    for _ in range(rounds + 1):
        alone.append(_timed(bare))
        whole.append(_timed(lambda: evaluate(model, pairs, len(pairs.classes), view, workers=workers)))
    beside = statistics.median(w / a - 1 for w, a in zip(whole[1:], alone[1:], strict=True))
    return {"seconds": statistics.median(whole[1:]) / len(pairs), "waited": None, "beside": beside}


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextlib.contextmanager
def _folder(size: tuple[int, int], pictures: int) -> Iterator[Path]:
    """Drawn scenes as people's photographs: JPEG files with masks."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for i, (image, labels) in enumerate(Scenes(pictures, size)):
            for split in ("train", "val"):
                for kind, ending, picture in (
                    ("images", "jpg", photo_image(image)),
                    ("masks", "png", Image.fromarray(labels.numpy())),
                ):
                    (root / split / kind).mkdir(parents=True, exist_ok=True)
                    picture.save(root / split / kind / f"{i}.{ending}")
        (root / "classes.txt").write_text("\n".join(Scenes.classes))
        yield root
