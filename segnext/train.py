"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from segnext_kernels import upsample_cross_entropy

from .images import normalise
from .palette import IGNORED


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the length is given in seconds, so that it is the same on every machine, or in steps.

    Args:
        seconds, steps: one of them; training ends, and the learning rate reaches zero, after that.
        batch: pictures in a step.
        lr, weight_decay, betas: of AdamW; norms, biases and layer scales are not decayed.
        warmup: the share (0 < warmup < 1) of the training in which the learning rate rises linearly; then it falls linearly.
        bfloat16: forward and backward under autocast.
        seed: of the order of the pictures; what the model and the augmentation draw is torch's global generator's.
    """

    seconds: float | None = None
    steps: int | None = None
    batch: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05
    bfloat16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise ValueError(f"give seconds or steps of training, one of them: got {self.seconds} and {self.steps}")

    def lr_factor(self, progress: float) -> float:
        """The learning rate's share of its peak at ``progress`` 0..1 of the training."""
        return max(0.0, min(progress / self.warmup, (1 - progress) / (1 - self.warmup)))


def fit(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    augment: Callable | None = None,
    class_weights: Tensor | None = None,
) -> list[float]:
    """Trains a model in place, on the device it is on, and leaves it in eval mode.

    Args:
        model: takes normalised images [B, 3, H, W] and gives logits [B, C, h, w].
        dataset: of (uint8 [3, H, W], labels [H, W]) pairs, label 255 ignored; of one size after augmentation.
        augment: takes and returns such a pair, as ``tv_tensors.Image`` and ``tv_tensors.Mask``.
        class_weights: of the classes in the loss [C], None for equal ones.

    Returns:
        The loss of every step.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.lr, betas=recipe.betas, fused=True)
    losses: list[float] = []
    for progress, (images, labels) in zip(_progress(recipe, losses), batches(dataset, recipe, augment), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.lr_factor(progress)
        images = normalise(images.to(device)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
            logits = model(images)
        loss = upsample_cross_entropy(logits, labels.to(device), IGNORED, class_weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {losses[-1]} in step {len(losses)}; try a smaller learning rate")
    model.eval()
    return losses


def class_weights(dataset: Dataset, classes: int, power: float) -> Tensor:
    """Weights in the loss [classes], each class' share of the labels to the power of ``-power``; the mean label weighs 1."""
    counts = torch.zeros(256, dtype=torch.int64)
    for _, labels in (dataset[i] for i in range(len(dataset))):
        counts += torch.bincount(labels.flatten().long(), minlength=256)
    shares = counts[:classes] / counts[:classes].sum().clamp_min(1)
    weights = shares.clamp_min(1e-4) ** -power
    return weights / (shares * weights).sum().clamp_min(1e-4)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters that are decayed (filters and matrices) and those that are not (vectors)."""
    filters = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return [{"params": filters, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def batches(dataset: Dataset, recipe: Recipe, augment: Callable | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, (uint8 [B, 3, H, W], labels [B, H, W]), every picture once before any comes again."""
    generator = torch.Generator().manual_seed(recipe.seed)
    sampler = RandomSampler(dataset, num_samples=1 << 40, generator=generator)

    def collate(pairs):
        if augment is not None:
            pairs = [augment(tv_tensors.Image(image), tv_tensors.Mask(labels)) for image, labels in pairs]
        return tuple(torch.stack([torch.as_tensor(item) for item in column]) for column in zip(*pairs, strict=True))

    return iter(DataLoader(dataset, recipe.batch, sampler=sampler, collate_fn=collate))


def photo_augmentation(size: tuple[int, int], crop: tuple[int, int]) -> v2.Transform:
    """Random crop of photos of about ``size`` (height, width) at 0.75 to 1.5 times their scale, flip and colours."""
    part = crop[0] * crop[1] / (size[0] * size[1])
    ratio = crop[1] / crop[0]
    return v2.Compose(
        [
            v2.RandomResizedCrop(crop, scale=(part / 1.5**2, min(1.0, part / 0.75**2)), ratio=(ratio / 1.15, ratio * 1.15)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3),
        ]
    )


def _progress(recipe: Recipe, losses: list[float]) -> Iterator[float]:
    """The share 0..1 of the training that is over, before every step, until all of it is; shown with the loss in a bar."""
    total, unit = (recipe.steps, "steps") if recipe.steps is not None else (recipe.seconds, "s")
    start = time.perf_counter()
    layout = f"training {{percentage:3.0f}}% |{{bar}}| {{n:.0f}}/{{total:.0f}} {unit}{{postfix}}"
    with tqdm(total=total, bar_format=layout) as bar:
        while True:
            done = len(losses) if recipe.steps is not None else min(time.perf_counter() - start, total)
            recent = losses[-20:]
            if recent:
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}", step=len(losses), refresh=False)
            bar.update(done - bar.n)
            if done >= total:
                return
            yield done / total
