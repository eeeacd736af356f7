"""One step of a training, what it needs and what of it a checkpoint holds."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import segnext_kernels
from segnext_kernels import upsample_cross_entropy

from . import distributed
from .data.loader import Batch, Order, batches, mixed_seed
from .graphed import Graphed
from .images import normalise
from .optimizer import optimizer, set_lr
from .palette import IGNORED
from .recipes import Recipe, RecipeError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Step:
    """What a step came to: its number from 1, loss, learning rate, share of the training done, seconds, and those spent waiting
    for data."""

    number: int
    loss: float
    lr: float
    progress: float
    seconds: float
    waited: float


class Trainer:
    """A model in training, in place, on the device it is on.

    Everything random in step k (crops, dropout, stochastic depth, bases) is drawn from what the seed, k and the share of the
    batch say, and the order of the pictures from the seed. So a training that is continued from :meth:`state` goes on bit for
    bit, and accumulated steps draw what as many processes would.

    Args:
        model: takes normalised images [B, 3, H, W] and gives logits [B, C, h, w].
        dataset: of (uint8 [3, H, W], uint8 labels [H, W]) pairs, label 255 ignored; of one size after augmentation. Its
            ``names``, if it has them, tell the pictures in messages.
        recipe: of which the data set's fields and the model's are not looked at.
        augment: takes and returns such a pair, as ``tv_tensors.Image`` and ``tv_tensors.Mask``.
        class_weights: of the classes in the loss [C], None for equal ones.
        accumulate: into how many parts, one after another, each process' share of the batch is cut.
        workers: processes that read pictures; 0 reads in this one.
        cuda_graph: on a GPU, in one process, launch forward and backward as one (:class:`segnext.graphed.Graphed`).

    Raises:
        RecipeError: there are no pictures, or the batch cannot be dealt out evenly.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        recipe: Recipe,
        *,
        augment: Callable | None = None,
        class_weights: Tensor | None = None,
        accumulate: int = 1,
        workers: int = 0,
        cuda_graph: bool = True,
    ) -> None:
        if len(dataset) == 0:
            raise RecipeError("there are no pictures to train on")
        shares = accumulate * distributed.world_size()
        if recipe.batch % shares:
            raise RecipeError(
                f"a batch of {recipe.batch} cannot be dealt out: {distributed.world_size()} processes, {accumulate} parts each"
            )
        if augment is not None and recipe.crop is not None:
            together = recipe.batch // (accumulate if recipe.sync_norm else shares)
            if together * math.prod(-(-side // 32) for side in recipe.crop) == 1:
                crop = "x".join(map(str, recipe.crop))
                raise RecipeError(
                    f"batch norms need more than one value, and one picture of {crop} at a time has one at the encoder's end:"
                    " give a larger --crop, a larger --batch, or fewer parts"
                )
        self.model, self.dataset, self.recipe, self.augment = model, dataset, recipe, augment
        self.device = next(model.parameters()).device
        self.class_weights = None if class_weights is None else class_weights.to(self.device)
        self.accumulate, self.workers, self.shares = accumulate, workers, shares
        self.precision = precision(recipe.precision, self.device)
        self.dtype = DTYPES.get(self.precision)
        self.done, self.seconds = 0, 0.0
        if recipe.sync_norm:
            distributed.synchronise_norms(model)
        model.to(memory_format=torch.channels_last)
        self.optimizer = optimizer(model, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.network: nn.Module = model
        if distributed.world_size() > 1:
            on_gpu = self.device.type == "cuda"
            self.network = DistributedDataParallel(
                model,
                device_ids=[self.device.index] if on_gpu else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                # Otherwise the order of summation changes after the first step, and a resumed training has another first step.
                find_unused_parameters=recipe.deterministic or not on_gpu,
            )
        if recipe.compile:
            self.network = torch.compile(self.network)
        self.graphed = cuda_graph and can_be_graphed(self.device)

    @property
    def progress(self) -> float:
        """The share 0..1 of the training that is over."""
        if self.recipe.seconds is not None:
            return min(1.0, self.seconds / self.recipe.seconds)
        return self.done / self.recipe.iterations

    def state(self) -> dict[str, Any]:
        """All that a later training needs to go on: dicts, lists, numbers and tensors (of which nothing is copied)."""
        return {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "done": self.done,
            "pictures": len(self.dataset),
            "seconds": self.seconds,
            "recipe": asdict(self.recipe),  # as it was; the folder's may be edited
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state` gave; the optimizer's rates are those of this trainer's recipe."""
        self.model.load_state_dict(state["state_dict"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if state["scaler"]:  # nothing but in float16, which the recipe may not have been in before
            self.scaler.load_state_dict(state["scaler"])
        self.done, self.seconds = state["done"], state["seconds"]

    def require_finite(self) -> None:
        """Raises a FloatingPointError if a weight is not finite any more."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise FloatingPointError(f"the weights are no longer finite after step {self.done}; a smaller --lr may help")

    def steps(self) -> Iterator[Step]:
        """Trains to the end, and tells of every step; the model is in training mode during one, and the caller may change it
        in between, with a CUDA graph the values of its parameters and buffers alone.

        Raises:
            FloatingPointError: the loss is no longer finite; the message names the pictures.
            DataError, ImageError: a picture cannot be read.
        """
        mine = [part * distributed.world_size() + distributed.rank() for part in range(self.accumulate)]
        order = Order(len(self.dataset), self.recipe.batch, self.recipe.seed, shares=self.shares, mine=mine, first=self.done)
        stream = batches(self.dataset, order, self.augment, workers=self.workers, pin_memory=self.device.type == "cuda")
        # Held by this loop alone, so that a graph's memory goes with it
        add_gradients = Graphed(self._add_gradients, self.model) if self.graphed else self._add_gradients
        with contextlib.closing(stream):
            while self.progress < 1:
                yield self._step(stream, mine, add_gradients)

    def _step(self, stream: Iterator[Batch], mine: list[int], add_gradients: Callable[[Tensor, Tensor], Tensor]) -> Step:
        start, waited, loss, indices = time.perf_counter(), 0.0, torch.zeros((), device=self.device), []
        self.model.train()
        factor = self.recipe.lr_factor(self.progress)
        set_lr(self.optimizer, factor)
        for share in mine:
            asked = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - asked
            indices += batch.indices
            torch.manual_seed(mixed_seed(self.recipe.seed, self.done, share, 0))
            with self._gradients_stay_here(share != mine[-1]):
                loss += add_gradients(*self._inputs(batch))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=not self.graphed)
        value = (distributed.all_reduce_sum(loss) / self.shares).item()
        self.done += 1
        if not np.isfinite(value):
            raise FloatingPointError(
                f"the loss became {value} in step {self.done} ({self.precision}, learning rate {factor * self.recipe.lr:.3g})"
                f" on {self._names(indices)}; begin anew with a smaller lr, or with the weights of a checkpoint"
            )
        seconds = time.perf_counter() - start
        if self.recipe.seconds is not None and distributed.world_size() > 1:  # all must agree on when it ends
            seconds = distributed.all_reduce_sum(torch.tensor(seconds, device=self.device)).item() / distributed.world_size()
        self.seconds += seconds
        return Step(self.done, value, factor * self.recipe.lr, self.progress, seconds, waited)

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images and labels as the network and its loss take them, on the device."""
        images = normalise(batch.images.to(self.device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
        return images, batch.labels.to(self.device, non_blocking=True).long()

    def _add_gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adds the gradient of a share of the batch; its loss."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.network(images)
        loss = pixel_loss(logits, labels, self.class_weights)
        self.scaler.scale(loss / self.accumulate).backward()
        return loss.detach()

    def _names(self, indices: list[int]) -> str:
        names = getattr(self.dataset, "names", None)
        return ", ".join(names[i] if names else f"picture {i}" for i in indices)

    def _gradients_stay_here(self, stay: bool) -> contextlib.AbstractContextManager:
        return self.network.no_sync() if stay and distributed.world_size() > 1 else contextlib.nullcontext()


def can_be_graphed(device: torch.device) -> bool:
    """Whether forward and backward can be one CUDA graph: not where processes exchange gradients meanwhile."""
    return device.type == "cuda" and distributed.world_size() == 1


def pixel_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The cross-entropy summed over the labelled pixels, divided by the number of all pixels: so the mean of equal shares of a
    batch is that of the batch.

    Source: ``CrossEntropyLoss`` of mmsegmentation, which divides by all pixels too (``avg_non_ignore=False``).
    """
    if class_weights is None:
        known = (labels != IGNORED).sum()
    else:
        known = F.pad(class_weights, (0, IGNORED + 1 - len(class_weights)))[labels].sum()
    return upsample_cross_entropy(logits, labels, IGNORED, class_weights) * (known / labels.numel())


def precision(name: str, device: torch.device) -> str:
    """float32, bfloat16 or float16; "auto" is bfloat16 where the device multiplies it faster, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    isa = segnext_kernels.build_info()["isa"]  # None without compiled kernels
    return "bfloat16" if device.type == "cpu" and isa is not None and isa.endswith("bf16") else "float32"
