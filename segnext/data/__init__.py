"""Data sets of (uint8 [3, H, W], uint8 labels [H, W]) pairs for training and evaluation; label 255 is ignored."""

from .legend import legend
from .pairs import DataError, Memory, MissingError, Pairs
from .registry import DATASETS, open_dataset, splits
from .scenes import Scenes

__all__ = ["DATASETS", "DataError", "Memory", "MissingError", "Pairs", "Scenes", "legend", "open_dataset", "splits"]
