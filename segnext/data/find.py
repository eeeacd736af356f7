"""Finding the files of a data set, and which image belongs to which mask."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .pairs import DataError, MissingError


def find_root(root: Path, *names: str, holds: str) -> Path:
    """``root`` itself or the first of ``names`` in it that has ``holds`` inside, so that a data set's parent will do as well.

    Raises:
        MissingError: none has.
    """
    for folder in (root, *(root / name for name in names)):
        if (folder / holds).exists():
            return folder
    places = f", nor in {', nor in '.join(names)}" if names else ""
    raise MissingError(f"{root}: there is no {holds} in this folder{places}" if root.is_dir() else f"{root}: no such folder")


def first_of(*paths: Path) -> Path:
    """The first that exists; if none does, the very first, which the error of its reader will then name."""
    return next((path for path in paths if path.exists()), paths[0])


def by_name(folder: Path, ending: str, pattern: str = "*") -> dict[str, Path]:
    """The visible files in a folder that match the pattern and the ending, by what comes before the ending, in order.

    Raises:
        DataError: there is no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found = {
        path.relative_to(folder).as_posix().removesuffix(ending): path
        for path in sorted(folder.glob(pattern + ending))
        if not path.name.startswith(".")
    }
    if not found:
        raise DataError(f"{folder}: there are no files {pattern}{ending} in this folder")
    return found


def read_list(path: Path) -> list[str]:
    """The names in a file that lists the images of a split, one a line; folders, endings and further columns are dropped."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file in UTF-8") from None
    return [Path(line.split()[0]).stem for line in lines if line.strip()]


def match(
    images: dict[str, Path], masks: dict[str, Path], names: Iterable[str] | None = None
) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Images and masks of the same name, and a sentence for every file that has no partner.

    Args:
        names: of the pairs that are wanted; None for all, in their order.
    """
    names = sorted(images.keys() | masks.keys()) if names is None else list(names)
    pairs = [(images[name], masks[name]) for name in names if name in images and name in masks]
    return pairs, [_fault(name, images.get(name), masks.get(name)) for name in names if name not in images or name not in masks]


def _fault(name: str, image: Path | None, mask: Path | None) -> str:
    if image:
        return f"{image}: there is no mask for this image"
    return f"{mask}: there is no image for this mask" if mask else f"{name}: listed, but there is neither image nor mask"
