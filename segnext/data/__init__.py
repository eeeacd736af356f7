"""Data sets of (uint8 [3, H, W], uint8 labels [H, W]) pairs for training and evaluation; label 255 is ignored."""

from .folder import DataError, Folder
from .scenes import Scenes

__all__ = ["DataError", "Folder", "Scenes"]
