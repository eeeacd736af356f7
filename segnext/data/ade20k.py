"""ADE20K's scene parsing challenge of 2016."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..palette import IGNORED
from .find import by_name, find_root, match
from .legend import legend
from .masks import lookup_table, read_by_table
from .pairs import Pairs

FOLDERS = {"train": "training", "val": "validation"}
TABLE = lookup_table({0: IGNORED, **{value: value - 1 for value in range(1, 151)}})


def ade20k(root: Path, split: str) -> Pairs:
    """ADE20K (SceneParsing) of 2016: 20210 images to train on, 2000 to validate on.

    ROOT/ or ROOT/ADEChallengeData2016/
        images/{training,validation}/ADE_*.jpg
        annotations/{training,validation}/ADE_*.png     0 is ignored, 1 to 150 are the classes
    """
    split = FOLDERS.get(split, split)
    root = find_root(root, "ADEChallengeData2016", holds=f"images/{split}")
    files, unpaired = match(by_name(root / "images" / split, ".jpg"), by_name(root / "annotations" / split, ".png"))
    return Pairs(*legend("ade20k"), files, partial(read_by_table, table=TABLE), unpaired)
