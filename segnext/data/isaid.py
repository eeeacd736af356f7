"""iSAID, aerial images, and how its large images are cut into patches."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from ..checkpoint import check_folder
from ..images import ImageError, image_size, read_image, stored_image, write_png
from ..palette import IGNORED, mask_image, photo_image
from ..windows import windows
from .find import by_name, find_root, first_of, match
from .legend import legend
from .masks import identity_table, look_up
from .pairs import DataError, MissingError, Pairs, require_same_size
from .workers import each, report_dead_workers

ENDING = "_instance_color_RGB.png"
SPLITS, IMAGES = ("train", "val"), ("images/images", "images")
MASKS = ("Semantic_masks/images/images", "Semantic_masks/images", *IMAGES)
TABLE = identity_table(16)


def isaid(root: Path, split: str) -> Pairs:
    """iSAID in patches, as "segnext data cut-isaid" or mmsegmentation's converter makes them of the downloaded images.

    ROOT/ or ROOT/iSAID/
        img_dir/{train,val}/P0000_Y0_Y1_X0_X1.png
        ann_dir/{train,val}/P0000_Y0_Y1_X0_X1_instance_color_RGB.png     colours as in iSAID's masks; or index-colour, 0 to
                                                                         15, 255 is ignored
    """
    root = find_root(root, "iSAID", holds=f"img_dir/{split}")
    files, unpaired = match(by_name(root / "img_dir" / split, ".png"), by_name(root / "ann_dir" / split, ENDING))
    return Pairs(*legend("isaid"), files, read_mask, unpaired)


def read_mask(path: str | Path) -> Tensor:
    """The labels uint8 [H, W] of a mask in iSAID's colours, or of an index-colour or greyscale one."""
    image = stored_image(path)
    if len(image.getbands()) == 1:
        return look_up(np.array(image).astype(np.int32), TABLE, path)
    numbers = np.asarray(image.convert("RGB")).astype(np.int32) @ (65536, 256, 1)
    palette = np.array(legend("isaid")[1]) @ (65536, 256, 1)
    order = palette.argsort()
    labels = order[np.searchsorted(palette[order], numbers).clip(max=len(palette) - 1)]
    wrong = palette[labels] != numbers
    if wrong.any():
        colour = divmod(numbers[wrong][0].item(), 65536)
        raise DataError(f"{path}: colour {(colour[0], *divmod(colour[1], 256))} stands for none of the {len(palette)} classes")
    return torch.from_numpy(labels.astype(np.uint8))


def cut_isaid(source: Path, out: Path, size: int = 896, stride: int = 512, workers: int = 0) -> int:
    """Cuts the downloaded images and masks into patches, for :func:`isaid`; patches that are there already are left.

    Patches at the right and lower edge are moved inwards; an image smaller than a patch is filled up with black, its mask with
    255. Masks are written in index-colour.

    Args:
        source: holds {train,val}/images/P0000.png with {train,val}/Semantic_masks/images/images/P0000_instance_color_RGB.png;
            the masks may as well be in Semantic_masks/images or beside the images, and the images in {train,val}/images/images.
        out: gets img_dir/{train,val}/P0000_Y0_Y1_X0_X1.png and ann_dir/{train,val}/P0000_..._instance_color_RGB.png.
        size: of a patch's sides.
        stride: from a patch to the next.
        workers: processes; 0 for none but this one.

    Returns:
        How many patches were written.

    Raises:
        DataError: no images, unpaired ones, files that are no images, unknown colours, a stride that leaves gaps, patches of
            another size or stride in ``out``, or a process died.
    """
    if stride > size:
        raise DataError(f"a stride of {stride} leaves gaps between patches of {size}")
    splits = [split for split in SPLITS if (source / split / "images").is_dir()]
    if not splits:
        raise MissingError(f"{source}: there is neither train/images nor val/images in this folder")
    written = 0
    for split in splits:
        pictures = _Pictures(_large(source / split), [out / kind / split for kind in ("img_dir", "ann_dir")], size, stride)
        with report_dead_workers():
            for patches, fault in each(pictures, workers, f"cutting {split}"):
                if fault:
                    raise DataError(fault)
                written += patches
    return written


def _large(folder: Path) -> list[tuple[Path, Path]]:
    images = by_name(first_of(*(folder / place for place in IMAGES)), ".png")
    masks = by_name(first_of(*(folder / place for place in MASKS)), ENDING)
    files, unpaired = match({name: path for name, path in images.items() if "_instance_" not in name}, masks)
    if unpaired:
        raise DataError(unpaired[0])
    return files


class _Pictures(Dataset):
    """Cuts the picture that is asked for; item: (number of patches written, what is wrong with the picture or "")."""

    def __init__(self, files: list[tuple[Path, Path]], out: list[Path], size: int, stride: int) -> None:
        self.files, self.out, self.size, self.stride = files, out, size, stride
        self.there: dict[str, set[str]] = defaultdict(set)  # of each picture
        for folder in out:
            check_folder(folder)
            for path in folder.glob("*.png"):
                name = path.name.removesuffix(ENDING).removesuffix(".png")
                self.there[name.rsplit("_", 4)[0]].add(name)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, str]:
        try:
            return self._cut(*self.files[index]), ""
        except (DataError, ImageError) as error:
            return 0, str(error)

    def _cut(self, image_file: Path, mask_file: Path) -> int:
        height, width = image_size(image_file)
        corners = [
            (rows.start, columns.start)
            for rows in windows(height, self.size, self.stride)
            for columns in windows(width, self.size, self.stride)
        ]
        paths = [self._paths(image_file.stem, top, left) for top, left in corners]
        if others := self.there[image_file.stem] - {image.stem for image, _ in paths}:
            raise DataError(f"{self.out[0] / min(others)}.png is no patch of this size and stride; choose an empty folder")
        if all(path.exists() for both in paths for path in both):
            return 0
        image, labels = read_image(image_file), read_mask(mask_file)
        require_same_size(image, labels, mask_file)
        lacking = (0, max(0, self.size - width), 0, max(0, self.size - height))
        image, labels = functional.pad(image, lacking), functional.pad(labels, lacking, value=IGNORED)
        palette, written = legend("isaid")[1], 0
        for (top, left), (image_path, mask_path) in zip(corners, paths, strict=True):
            if image_path.exists() and mask_path.exists():
                continue
            window = np.s_[..., top : top + self.size, left : left + self.size]
            write_png(photo_image(image[window]), image_path)
            write_png(mask_image(labels[window], palette), mask_path)
            written += 1
        return written

    def _paths(self, name: str, top: int, left: int) -> tuple[Path, Path]:
        patch = f"{name}_{top}_{top + self.size}_{left}_{left + self.size}"
        return self.out[0] / f"{patch}.png", self.out[1] / f"{patch}{ENDING}"
