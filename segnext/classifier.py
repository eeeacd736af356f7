"""The encoder as the classifier that it was before it segmented."""

from __future__ import annotations

from torch import Tensor, nn

from .model import Config
from .mscan import MSCAN


class Classifier(nn.Module):
    """Images to class logits: the mean over the pixels of the encoder's last map, and one linear layer.

    Args:
        config: its encoder's part and ``num_classes`` are used.

    Attributes:
        classes: the classes' names, or None where nobody gave them.

    Shape: [B, in_channels, H, W] -> [B, num_classes].
    Source: the official VAN-Classification, with which the encoders are trained on ImageNet.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.classes: list[str] | None = None
        self.backbone = MSCAN(config.channels, config.depths, config.mlp_ratios, config.in_channels, config.drop_path)
        self.head = nn.Linear(config.channels[-1], config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[-1].mean((2, 3)))
