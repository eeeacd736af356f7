"""AdamW as SegNeXt is trained with it."""

from __future__ import annotations

import torch
from torch import nn

from .recipes import Recipe

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


def optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW on :func:`parameter_groups`; :func:`set_lr` gives it its learning rates."""
    return torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr, betas=recipe.betas, fused=True)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """The parameters of encoder and head, each with and without weight decay, with their peak learning rate as ``peak``.

    Norms are not decayed; parameters under ``decode_head`` have the head's learning rate.

    Source: the official code's ``paramwise_cfg``, which goes by names: there the head's and the stem's norms are decayed too.
    """
    in_norms = {id(parameter) for module in model.modules() if isinstance(module, NORMS) for parameter in module.parameters()}
    groups = [
        {"params": [], "peak": recipe.lr * factor, "weight_decay": decay}
        for factor in (1.0, recipe.head_lr)
        for decay in (recipe.weight_decay, 0.0)
    ]
    for name, parameter in model.named_parameters():
        groups[2 * name.startswith("decode_head.") + (id(parameter) in in_norms)]["params"].append(parameter)
    return groups


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's learning rate to a share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
