"""The folder of a training: checkpoints that are whole at any moment, and figures as CSV, for TensorBoard, and drawn."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .checkpoint import check_folder, replacing, writing
from .evaluate import Scores
from .recipes import RecipeError
from .trainer import Step, Trainer
from .weights import WeightsError, about, save

TRAIN = ("step", "loss", "lr", "seconds", "waited")
VAL = ("step", "mIoU", "mean_accuracy", "pixel_accuracy")


class Run:
    """What a training leaves behind.

    ``last.pth``: all that it takes to go on, and weights that :func:`segnext.load` takes. ``best.pth``: the weights of the best
    evaluation, ``model.pth``: those of the end. ``train.csv``, ``val.csv``, ``curves.png``, and TensorBoard's events.

    Args:
        folder: made if it isn't there.
        done: the steps of the training so far; what the figures say of later ones, which will be done again, is taken out.
        due: whether the evaluation of the last of them will be done again, too.
    """

    def __init__(self, folder: Path, done: int = 0, due: bool = False) -> None:
        import matplotlib.figure  # noqa: F401 - if it is not installed, say so now, not at the first evaluation
        from torch.utils.tensorboard import SummaryWriter

        check_folder(folder)
        self.folder, self.lock = folder, _locked(folder)
        for unfinished in folder.glob(f".*.{'[0-9a-f]' * 32}"):  # of a process that was killed while it wrote
            unfinished.unlink()
        ends = {"train": done, "val": done - due}
        self.files = {name: _rewritten(folder / f"{name}.csv", columns, ends[name]) for name, columns in _COLUMNS.items()}
        self.board = SummaryWriter(str(folder), purge_step=done + 1)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.board.close()
        _locks.discard(self.lock)
        os.close(self.lock)

    def log_step(self, step: Step, mean_loss: float) -> None:
        row = (step.number, f"{mean_loss:.6g}", f"{step.lr:.6g}", f"{step.seconds:.4f}", f"{step.waited:.4f}")
        self._log("train", row)

    def log_scores(self, number: int, scores: Scores) -> None:
        self._log("val", (number, *(f"{x:.6f}" for x in (scores.miou, scores.mean_accuracy, scores.pixel_accuracy))))

    def _log(self, name: str, row: tuple) -> None:
        try:
            csv.writer(self.files[name]).writerow(row)
            self.files[name].flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{self.folder / name}.csv") from error
        for title, value in zip(_COLUMNS[name][1:], row[1:], strict=True):
            self.board.add_scalar(f"{name}/{title}", float(value), row[0])

    def save(self, trainer: Trainer, best: float, losses: Sequence[float] = (), due: bool = False) -> None:
        """Writes ``last.pth``, with the best mIoU so far, the losses since the last line of train.csv, and whether the
        evaluation of this step is still to come.

        Raises:
            WeightsError: it cannot be written; the one before stays.
        """
        path = self.folder / "last.pth"
        state = {**trainer.state(), "best": best, "losses": list(losses), "due": due, "meta": about(trainer.model)}
        try:
            with writing(path) as file:
                torch.save(state, file)
        except WeightsError as error:
            before = f"{path} of before is whole" if path.exists() else "there is no earlier checkpoint"
            raise WeightsError(f"{error}; {before}") from error

    def save_weights(self, trainer: Trainer, name: str) -> None:
        save(trainer.model, self.folder / name)

    def draw(self) -> None:
        """Draws ``curves.png`` from the CSV files."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, name, columns in ((left, "train", ("loss",)), (right, "val", VAL[1:])):
            rows = read_csv(self.folder / f"{name}.csv")
            for column in columns:
                axes.plot([int(row["step"]) for row in rows], [float(row[column]) for row in rows], label=column, marker=".")
            axes.set(xlabel="step", title=name)
            axes.legend()
        with replacing(self.folder / "curves.png") as file:
            figure.savefig(file, format="png")


_COLUMNS = {"train": TRAIN, "val": VAL}


def last(folder: Path) -> dict[str, Any] | None:
    """What ``last.pth`` in the folder holds; None if there is none.

    Raises:
        WeightsError: it cannot be read.
    """
    path = folder / "last.pth"
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make torch raise anything, with any advice
        raise WeightsError(f"{path} cannot be read, it may be cut short or no checkpoint at all") from error
    if not isinstance(state, dict) or "optimizer" not in state:
        raise WeightsError(f"{path} is no checkpoint to go on from: it has no optimizer's state")
    return state


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


_locks: set[int] = set()  # what _locked returned; a forked process, which may outlive this one, keeps none of them
os.register_at_fork(after_in_child=lambda: [os.close(_locks.pop()) for _ in range(len(_locks))])


def _locked(folder: Path) -> int:
    """A descriptor of the folder, which no other process has while this one keeps it.

    Raises:
        RecipeError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RecipeError(f"another process is training in {folder}") from None
    except OSError:  # a network's file system may have no locks
        pass
    _locks.add(descriptor)
    return descriptor


def _rewritten(path: Path, columns: Sequence[str], done: int) -> io.TextIOBase:
    """The CSV file with its rows up to step ``done``, open for more; a last line that was cut off is dropped."""
    rows = read_csv(path) if path.exists() else []
    whole = [row for row in rows if all(row.get(name) for name in columns) and row["step"].isdigit()]
    kept = [row for row in whole if int(row["step"]) <= done]
    with replacing(path) as file:
        text = io.TextIOWrapper(file, newline="", write_through=True)
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(kept)
        text.detach()
    return path.open("a", newline="")


@contextlib.contextmanager
def open_run(folder: Path, done: int, due: bool = False) -> Iterator[Run]:
    run = Run(folder, done, due)
    try:
        yield run
    finally:
        run.close()
