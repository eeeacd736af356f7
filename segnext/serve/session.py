"""What the page shows: photographs that were sent, their labels, scores, heat maps, and the time that each step took."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from segnext_kernels import upsample_argmax

from ..distributed import explain_out_of_memory
from ..figure import model_title
from ..fuse import FusedSegNeXt, inference_model
from ..gradcam import heat_image, heat_map
from ..images import decode_image
from ..palette import mask_image, photo_image
from ..predict import load_for_photographs, seen_size
from ..views import resized

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")  # MPO: what some telephones write as .jpg
MOST_PIXELS = 100 * 10**6
SHOWN_SIDE = 2048  # pixels at most on the longer side of what the page shows and labels
HELD = 8  # photographs, the latest


class Gone(LookupError):
    """A photograph that is not held, or no longer."""


@dataclass
class Photo:
    """image: uint8 [3, H, W], as shown. logits: float32 [1, C, h, w] at stride 8 of what the model saw. labels: uint8 [H, W].

    seconds: of each step, in order.
    """

    key: str
    original: tuple[int, int]  # height and width
    image: Tensor
    logits: Tensor
    labels: np.ndarray
    seconds: dict[str, float]


@dataclass
class Laps:
    """A stop watch; on a GPU it waits for what was launched."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=perf_counter)

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = perf_counter()
        self.seconds[name], self.last = now - self.last, now


class Session:
    """A model and the photographs that it was shown last. Its methods are for one thread at a time."""

    def __init__(self, weights: str | Path, *, rank: int | None, short_side: int | None, device: str) -> None:
        self.device = torch.device(device)
        model = load_for_photographs(weights, rank)
        self.fast = inference_model(model, self.device)
        self.model = model.to(self.device, memory_format=torch.channels_last)  # which Grad-CAM can differentiate
        self.name, self.classes, self.palette = model_title(model.config), model.classes, model.palette
        self.short_side = short_side
        self.photos: OrderedDict[str, Photo] = OrderedDict()

    def add(self, data: bytes, name: str) -> Photo:
        """Segments a photograph.

        Args:
            data: the content of a file in one of ``FORMATS``.

        Raises:
            ImageError: not a whole one, of another format, or too many pixels; it calls it by the name.
        """
        laps = Laps(self.device)
        original = decode_image(data, name, FORMATS, MOST_PIXELS)
        laps.lap("read the file")
        image = shrunk(original, SHOWN_SIDE)
        # As large as Grad-CAM, which has only what is shown, sees it
        images = resized(original[None].to(self.device), seen_size(self.fast, image, self.short_side))
        laps.lap("resize, normalise")
        with torch.inference_mode(), explain_out_of_memory(self.device, "a smaller --short-side"):
            logits = timed(self.fast, images, laps)
            labels = upsample_argmax(logits, image.shape[-2:])[0].to(torch.uint8).cpu().numpy()
        laps.lap("labels")
        size = tuple(original.shape[-2:])
        photo = Photo(secrets.token_urlsafe(12), size, image, logits.float().cpu(), labels, laps.seconds)
        self.photos[photo.key] = photo
        while len(self.photos) > HELD:
            self.photos.popitem(last=False)
        return photo

    def photo(self, key: str) -> Photo:
        try:
            return self.photos[key]
        except KeyError:
            raise Gone(f"this photograph is no longer held, only the latest {HELD} are; open it again") from None

    def shares(self, photo: Photo) -> dict[int, float]:
        """The classes that occur, with their parts of the pixels, the largest first."""
        counts = np.bincount(photo.labels.ravel(), minlength=len(self.classes))
        return {int(i): counts[i] / photo.labels.size for i in np.argsort(-counts, kind="stable") if counts[i]}

    def scores(self, photo: Photo, x: int, y: int) -> Tensor:
        """The probabilities of the classes at a pixel, [C]: softmax of the upsampled logits."""
        return logits_at(photo.logits, x, y, photo.labels.shape).softmax(0)

    def heat(self, photo: Photo, category: int, layer: str, pixel: tuple[int, int] | None) -> Image.Image:
        """Grad-CAM's map of a class over the photograph; with a pixel, of the region around it."""
        with explain_out_of_memory(self.device, "a smaller --short-side"):
            return heat_image(photo.image, heat_map(self.model, photo.image, category, layer, pixel, self.short_side))

    def mask(self, photo: Photo) -> Image.Image:
        """Index-colour, at the full size of the file, which may be larger than what the page shows."""
        return mask_image(upsample_argmax(photo.logits, photo.original)[0], self.palette)

    def picture(self, photo: Photo) -> Image.Image:
        return photo_image(photo.image)


def shrunk(image: Tensor, side: int) -> Tensor:
    """The picture [3, H, W] with at most so many pixels on its longer side."""
    size = image.shape[-2:]
    if max(size) <= side:
        return image
    return functional.resize(image, [max(1, round(n * side / max(size))) for n in size], antialias=True)


def timed(model: nn.Module, images: Tensor, laps: Laps) -> Tensor:
    """The model's logits, with the time of each stage of the encoder and of the head."""
    encoder = model.backbone
    ends = encoder.stages if isinstance(model, FusedSegNeXt) else [getattr(encoder, f"norm{i}") for i in range(1, 5)]
    hooks = [end.register_forward_hook(lambda *_, name=f"encoder, stage {i}": laps.lap(name)) for i, end in enumerate(ends, 1)]
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    laps.lap("decoder head")
    return logits


def logits_at(logits: Tensor, x: int, y: int, size: tuple[int, int]) -> Tensor:
    """What bilinear upsampling of logits [1, C, h, w] to a size (H, W) gives at one pixel: [C]."""
    height, width = size
    place = logits.new_tensor([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1])
    return F.grid_sample(logits, place.view(1, 1, 1, 2), padding_mode="border", align_corners=False)[0, :, 0, 0]
