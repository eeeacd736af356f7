"""SegNeXt: an MSCAN encoder and a decode head."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from segnext_kernels import upsample_argmax
from segnext_kernels.nn import NMF2D

from .checkpoint import plain
from .heads import HamHead, MSCAHead
from .mscan import MSCAN

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images, in units of 0..1
HEADS = ("ham", "msca")
CHOICES = {"head": HEADS, "bases": ("fixed", "random"), "gradient": ("exact", "one_step")}


@dataclass(frozen=True)
class Config:
    """Everything that a SegNeXt is built from.

    Attributes:
        channels, depths, mlp_ratios: of the encoder's four stages.
        decoder_channels: a multiple of 32.
        rank: of the Ham head's matrix decomposition; the MSCA head has none.
        head: "ham" or "msca".
        num_classes, in_channels: of the logits and of the images.
        drop_path: stochastic depth of the last block; it grows linearly from 0 in the first.
        dropout: of whole channels before the classifier.
        bases, gradient, eval_steps: of the matrix decomposition, see :class:`segnext_kernels.nn.NMF2D`.
    """

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    decoder_channels: int = 256
    rank: int = 16
    head: str = "ham"
    num_classes: int = 150
    in_channels: int = 3
    drop_path: float = 0.1
    dropout: float = 0.1
    bases: str = "fixed"
    gradient: str = "exact"
    eval_steps: int = 7

    def __post_init__(self) -> None:
        for declared in fields(self):
            object.__setattr__(self, declared.name, plain(getattr(self, declared.name)))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("num_classes", "in_channels", "rank", "eval_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("drop_path", "dropout"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")


SIZES = {
    "t": Config((32, 64, 160, 256), (3, 3, 5, 2), decoder_channels=256, rank=16),
    "s": Config((64, 128, 320, 512), (2, 2, 4, 2), decoder_channels=256, rank=16),
    "b": Config((64, 128, 320, 512), (3, 3, 12, 3), decoder_channels=512, rank=64),
    "l": Config((64, 128, 320, 512), (3, 5, 27, 3), decoder_channels=1024, rank=64, drop_path=0.3),
}


def require_images(images: Tensor, channels: int) -> None:
    """Raises a ValueError or TypeError for what no model of so many input channels takes."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"the model takes images [B, {channels}, H, W], got shape {list(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"the model takes normalised images of a floating-point dtype, got {images.dtype}")


class SegNeXt(nn.Module):
    """Images to class logits.

    Args:
        config: the architecture; :data:`SIZES` has the paper's.

    Attributes:
        classes: the classes' names, or None where nobody gave them.
        palette: the classes' colours as (red, green, blue) of 0..255, or None.
        scale, multiple, window, stride: how evaluation shows it pictures, as :class:`segnext.recipes.Recipe` has them: resized
            to just fit into (long, short) sides, or None where nobody said; both sides a multiple of a number; through a
            sliding window (height, width), so far apart, or None.

    Source: SegNeXt (NeurIPS 2022); names, initialisation and behaviour of the official code, but for the decomposition's bases,
    which in evaluation are the same at every call unless ``config.bases`` is "random".
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.classes: list[str] | None = None
        self.palette: list[tuple[int, int, int]] | None = None
        self.scale: tuple[int, int] | None = None
        self.multiple = 1
        self.window: tuple[int, int] | None = None
        self.stride: tuple[int, int] | None = None
        self.backbone = MSCAN(config.channels, config.depths, config.mlp_ratios, config.in_channels, config.drop_path)
        args = (config.channels[1:], config.decoder_channels, config.num_classes, config.dropout)
        if config.head == "ham":
            options = {"eval_steps": config.eval_steps, "bases": config.bases, "gradient": config.gradient}
            self.decode_head = HamHead(*args, ham=NMF2D(config.rank, **options))
        else:
            self.decode_head = MSCAHead(*args)

    def forward(self, images: Tensor, bases: Tensor | None = None) -> Tensor:
        """The logits at stride 8.

        Args:
            images: [B, in_channels, H, W] of any size, normalised with :data:`MEAN` and :data:`STD`, in either layout.
            bases: [B, decoder_channels, rank] >= 0, what the Ham head's decomposition starts from instead of its own.

        Returns:
            logits: [B, num_classes, ceil(H / 8), ceil(W / 8)].
        """
        require_images(images, self.config.in_channels)
        return self.decode_head(self.backbone(images), bases)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The label maps: for every pixel the class with the largest logit, after bilinear upsampling.

        Args:
            images: [B, in_channels, H, W], as for :meth:`forward`.

        Returns:
            labels: [B, H, W], int64.

        Raises:
            RuntimeError: the model is in training mode, in which norms would learn from the images.
        """
        if self.training:
            raise RuntimeError("predict: the model is in training mode, call its eval() first")
        return upsample_argmax(self(images), images.shape[-2:])


def create(
    size: str,
    num_classes: int = 150,
    head: str = "ham",
    *,
    in_channels: int = 3,
    rank: int | None = None,
    drop_path: float | None = None,
    dropout: float = 0.1,
    bases: str = "fixed",
    gradient: str = "exact",
    eval_steps: int = 7,
) -> SegNeXt:
    """A SegNeXt of the paper with random weights, in training mode.

    Args:
        size: "t", "s", "b" or "l".
        rank, drop_path: the paper's unless given. See :class:`Config` for these and the rest.

    Raises:
        ValueError: an unknown size, head or kind of bases, or a number out of its range.
    """
    config = replace(
        _config(size),
        num_classes=num_classes,
        head=head,
        in_channels=in_channels,
        dropout=dropout,
        bases=bases,
        gradient=gradient,
        eval_steps=eval_steps,
    )
    given = {name: value for name, value in (("rank", rank), ("drop_path", drop_path)) if value is not None}
    return SegNeXt(replace(config, **given))


def encoder(size: str, in_channels: int = 3) -> MSCAN:
    """The encoder alone of size "t", "s", "b" or "l" of the paper, with random weights: images to four feature maps."""
    config = _config(size)
    return MSCAN(config.channels, config.depths, config.mlp_ratios, in_channels, config.drop_path)


def _config(size: str) -> Config:
    if size not in SIZES:
        raise ValueError(f"there is no size {size!r}; there are {', '.join(SIZES)}")
    return SIZES[size]
