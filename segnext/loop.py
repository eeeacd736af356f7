"""The steps of a training: their records, checkpoints and evaluations, and the bar that shows them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from . import distributed
from .data.pairs import Pairs
from .evaluate import Scores, evaluate, view_of
from .fuse import inference_model
from .recipes import Recipe
from .run import Run
from .signals import Signals, stop_signals
from .trainer import Step, Trainer

SMOOTHED = 20  # steps over which the shown loss is a mean


@dataclass
class Loop:
    """A training to its end; the first process, which has the run, keeps the records.

    Attributes:
        val: what is evaluated on, None for no evaluation.
        best: the largest mIoU so far.
        losses: of the steps since the last line of train.csv.
        due: whether the evaluation of the last step has not been.
        workers: processes that read pictures for evaluation on a GPU.
        ended: whether the last step was.
        signals: what asked to stop.
    """

    trainer: Trainer
    run: Run | None
    val: Pairs | None
    best: float
    losses: list[float]
    due: bool
    workers: int
    ended: bool = False
    signals: Signals = field(default_factory=Signals)

    def train(self) -> None:
        """Trains.

        Raises:
            KeyboardInterrupt: it was asked to stop; the step that it was at is in ``last.pth``.
        """
        if self.run is not None and self.trainer.done == 0:
            print(_headline(self.trainer, self.val), flush=True)
        if self.due:
            self._evaluate()
        with stop_signals() as self.signals:
            for step in with_bar(self.trainer, silent=self.run is None):
                self._after(step)
                if self.signals.heard and self.run is not None:  # the other processes wait for this one, and end with it
                    break
            if self.signals.heard and (self.due or not self.ended):
                self._save_what_was_stopped()
                raise KeyboardInterrupt
        if self.run is not None:
            self.run.draw()
            self.run.save_weights(self.trainer, "model.pth")
            best = f" and {self.run.folder / 'best.pth'} (mIoU {self.best:.3f})" if self.best >= 0 else ""
            if self.val is not None and not best:
                best = f"; there is no best.pth, since no pixel of {self.trainer.recipe.val} has a class"
            print(f"wrote {self.run.folder / 'model.pth'}{best}")

    def _after(self, step: Step) -> None:
        """Records, saves and evaluates, as the recipe has it after this step."""
        recipe, run = self.trainer.recipe, self.run
        self.losses.append(step.loss)
        self.ended = step.progress >= 1

        def is_time(every: int) -> bool:
            return step.number % every == 0 or self.ended

        self.due = self.val is not None and is_time(recipe.evaluate_every)
        save = self.due or is_time(recipe.save_every)
        if save:
            self.trainer.require_finite()
        if run is not None and is_time(recipe.log_every):
            run.log_step(step, sum(self.losses) / len(self.losses))
            self.losses.clear()
        if save:
            self._save()  # first, so that an evaluation that fails costs no steps
        if self.due and (run is None or not self.signals.heard):
            try:
                self._evaluate()
            except KeyboardInterrupt:
                if self.signals.heard:  # last.pth says that it is due
                    return
                raise
            self._save()
            if run is not None and not self.ended:
                run.draw()

    def _save(self) -> None:
        if self.run is not None:
            self.run.save(self.trainer, self.best, self.losses, due=self.due)

    def _save_what_was_stopped(self) -> None:
        if self.run is not None:
            self.trainer.require_finite()
            self._save()
            place = self.run.folder / "last.pth"
            print(f"stopped after step {self.trainer.done}, which {place} holds: --resume goes on", flush=True)

    def _evaluate(self) -> None:
        """Evaluates, and keeps the scores and the best weights."""
        trainer, run = self.trainer, self.run
        with nullcontext() if run is None else self.signals.stopping_at_once():  # the other processes end with the first
            scores = _evaluated(trainer, self.val, self.workers)
        if run is not None:
            tqdm.write(f"step {trainer.done}: {scores} on {len(self.val)} pictures of {trainer.recipe.val}")
            run.log_scores(trainer.done, scores)
            if scores.miou > self.best:
                run.save_weights(trainer, "best.pth")
        self.best, self.due = max(self.best, scores.miou), False


@contextmanager
def kernels_tuned(on: bool) -> Iterator[None]:
    """Convolutions on GPUs, and our Triton kernels, are timed at their first call within the block, or are not."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _evaluated(trainer: Trainer, val: Pairs, workers: int) -> Scores:
    distributed.share_buffers(trainer.model)
    model = inference_model(trainer.model.eval(), trainer.device)
    workers = workers if trainer.device.type == "cuda" else 0
    ways = "a smaller --scale, --window and --stride for evaluation, or --val none"
    with kernels_tuned(False), distributed.explain_out_of_memory(trainer.device, ways):  # pictures have many sizes
        view, progress = view_of(trainer.recipe), distributed.rank() == 0
        return evaluate(model, val, len(val.classes), view, workers=workers, progress=progress)


def with_bar(trainer: Trainer, silent: bool = False):
    """The trainer's steps, with a bar that shows how much is done, the loss, and the share of time spent waiting for data."""
    recipe = trainer.recipe
    total, unit = (recipe.iterations, "steps") if recipe.seconds is None else (recipe.seconds, "s")
    layout = f"training {{percentage:3.0f}}% |{{bar}}| {{n:.0f}}/{{total:.0f}} {unit} [{{elapsed}}<{{remaining}}]{{postfix}}"
    recent: list[Step] = []
    every = 0.1 if sys.stderr.isatty() else 30  # seconds; in a file every update is a line
    with tqdm(total=total, initial=trainer.progress * total, bar_format=layout, mininterval=every, disable=silent) as bar:
        for step in trainer.steps():
            recent = [*recent[1 - SMOOTHED :], step]
            waited = sum(one.waited for one in recent) / sum(one.seconds for one in recent)
            loss = sum(one.loss for one in recent) / len(recent)
            bar.set_postfix(loss=f"{loss:.3f}", step=step.number, data=f"{waited:.0%}", refresh=False)
            bar.update(step.progress * total - bar.n)
            yield step


def fit(
    model: nn.Module, dataset: Dataset, recipe: Recipe, *, augment=None, class_weights: Tensor | None = None
) -> list[float]:
    """Trains a model in place, without a folder, and leaves it in eval mode; see :class:`segnext.trainer.Trainer`.

    Returns:
        The loss of every step.
    """
    trainer = Trainer(model, dataset, recipe, augment=augment, class_weights=class_weights)
    losses = [step.loss for step in with_bar(trainer)]
    model.eval()
    return losses


def _headline(trainer: Trainer, val: Pairs | None) -> str:
    recipe = trainer.recipe
    length = f"{recipe.iterations} steps" if recipe.seconds is None else f"{recipe.seconds:.0f} s"
    processes = "" if distributed.world_size() == 1 else f", {distributed.world_size()} processes"
    return (
        f"SegNeXt-{recipe.size.upper()} on {len(trainer.dataset)} pictures of {recipe.dataset} ({recipe.train})"
        f"{'' if val is None else f', evaluated on {len(val)} ({recipe.val})'}: {length} of {recipe.batch} at"
        f" {recipe.crop[0]}x{recipe.crop[1]}, {recipe.precision}, on {trainer.device}{processes}"
    )
