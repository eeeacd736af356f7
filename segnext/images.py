"""Reading any image file as people see it, and writing PNG files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from .checkpoint import replacing
from .errors import SegnextError
from .model import MEAN, STD

TURNS = {  # by EXIF's orientation, how a picture becomes upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

NO_PHOTOS = ("BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG")  # by PIL's names, of which it reads some, and knows the endings

LOSSY = {  # formats, and compressions of TIFF, by PIL's names
    "JPEG": "JPEG",
    "MPO": "JPEG",
    "AVIF": "AVIF",
    "JPEG2000": "JPEG 2000",
    "jpeg": "TIFF with JPEG",
    "tiff_jpeg": "TIFF with JPEG",
    "webp": "TIFF with WebP",
}


class ImageError(SegnextError, RuntimeError):
    """A file that is not a whole image; the message names it."""


def read_image(path: str | Path) -> Tensor:
    """An image file of any format that PIL reads, as it is shown: uint8 [3, H, W], RGB.

    The EXIF orientation is applied, transparent pixels are composited on white, 16-bit values are scaled to 8 bits. Of an
    animation it is the first picture.

    Raises:
        ImageError: no such file, no image, a truncated one, or more pixels than PIL's limit against decompression bombs.
    """
    return _tensor(_open(path, _shown))


def decode_image(data: bytes, name: str, formats: Sequence[str], most_pixels: int) -> Tensor:
    """As :func:`read_image`, of a file's content that a stranger may have sent.

    Args:
        name: what errors call it.
        formats: those that are tried, by PIL's names; one that this PIL lacks is no error.
        most_pixels: a picture with more is refused before its pixels are decoded.
    """
    Image.init()
    known = [kind for kind in formats if kind in Image.OPEN]
    return _tensor(_open(name, _shown, BytesIO(data), known, most_pixels))


def read_labels(path: str | Path) -> Tensor:
    """The label of every pixel of a greyscale or index-colour image file, its colours not applied: int32 [H, W].

    Raises:
        ImageError: as :func:`read_image`, or an image of several channels, or in a format that changes labels.
    """
    image = stored_image(path)
    if len(image.getbands()) > 1:
        raise ImageError(
            f"{path}: a mask must be greyscale or index-colour, one label per pixel; this one is {image.mode}"
            " (docs/training.md shows how colours become labels)"
        )
    if image.mode == "F":
        raise ImageError(f"{path}: a mask must have whole numbers, this one has floating-point ones")
    return torch.from_numpy(np.array(image).astype(np.int32))


def stored_image(path: str | Path) -> Image.Image:
    """A mask, upright, in the mode and with the values in which it is stored.

    Raises:
        ImageError: as :func:`read_image`, or in a format that changes values.
    """
    return _open(path, _stored)


def _stored(image: Image.Image) -> Image.Image:
    """Without what PIL multiplies values by: greys of 2 and 4 bits fill 8."""
    if (lossy := image.format) in LOSSY or (lossy := image.info.get("compression")) in LOSSY:
        raise ValueError(f"a mask in {LOSSY[lossy]} can have other labels than were stored; save it as PNG")
    given = image.tile[0][3] if image.tile else ()  # what the decoder is told of the file, read before it begins
    packing, *others = (given,) if isinstance(given, str) else given or (None,)
    if image.format == "PPM" and image.mode != "1" and others and others[0] not in (255, 65535):
        raise ValueError(f"a mask in PGM of values up to {others[0]} is read as one up to 255; save it as PNG")
    unit = {"L;2": 85, "L;2R": 85, "L;4": 17, "L;4R": 17}.get(packing, 1)
    image = _upright(image)
    return image if unit == 1 else Image.fromarray(np.asarray(image) // unit)


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))  # ImageOps.exif_transpose stumbles over other tags
    return image if turn is None else image.transpose(turn)


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width, without reading the pixels.

    Raises:
        ImageError: as :func:`read_image`, but for what only the pixels show.
    """
    return _open(path, lambda image: (image.height, image.width))


def image_files(folder: Path) -> list[Path]:
    """The files directly inside a folder that end as images do, by name, but for those whose name begins with a dot, as
    macOS's ``._a.jpg``."""
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in NO_PHOTOS}
    files = (path for path in folder.iterdir() if path.suffix.lower() in endings and not path.name.startswith("."))
    return sorted(path for path in files if path.is_file())


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _open(path, convert, file=None, formats=None, most_pixels=None):
    """What ``convert`` makes of the image in a file, by default the one at the path, which errors name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of large pictures and odd metadata, which do no harm
            # Not by name, since PIL maps such files into memory, and then turns some of them wrongly (TIFF, not packed)
            source = partial(open, path, "rb") if file is None else partial(nullcontext, file)
            with source() as opened, Image.open(opened, formats=formats) as image:
                if most_pixels is not None and image.width * image.height > most_pixels:
                    raise ValueError(f"it has {image.width}x{image.height} pixels, more than {most_pixels / 10**6:g} million")
                return convert(image)
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise ImageError(f"{path}: the image has more than {limit} million pixels; make it smaller first") from None
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{path}: not an image, or of an unknown format") from None
    except MemoryError:
        raise ImageError(f"{path}: there is not enough memory for the image; make it smaller first") from None
    except Exception as error:  # what a decoder raises on a broken file depends on where it breaks
        raise ImageError(f"{path}: cannot be read as an image: {error}") from error


def _shown(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode.startswith("I"):  # 16 bits, in PIL's names I;16, I;16B or I
        image = _of_16_bits(image)
    elif image.mode == "F":
        raise ValueError("its values are floating-point numbers of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _of_16_bits(image: Image.Image) -> Image.Image:
    """Shown in 8 bits; one grey value may be transparent."""
    values, transparent = np.asarray(image), image.info.get("transparency")
    shown = Image.fromarray(_eight_bits(values))
    if isinstance(transparent, int):
        shown.putalpha(Image.fromarray(np.where(values == transparent, np.uint8(0), np.uint8(255))))
    return shown


def _eight_bits(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its values do not fit in 16 bits")
    return ((values * 255 + 32767) // 65535).astype(np.uint8)


def normalise(images: Tensor) -> Tensor:
    """What the models take: uint8 [..., 3, H, W] to float32, minus ImageNet's mean and over its standard deviation."""
    return functional.normalize(functional.to_dtype(images, torch.float32, scale=True), list(MEAN), list(STD))


def write_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG file that is either whole or not there."""
    with replacing(path) as file:
        image.save(file, format="PNG")
