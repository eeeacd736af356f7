"""The fused loss of a decode head: resize, cross-entropies and accuracy without the upsampled logits."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .._modules import why_must_be_called
from .._validate import accumulator
from ..upsample_argmax import upsample_argmax
from ..upsample_cross_entropy import upsample_cross_entropy
from .changed import require_unchanged
from .kinds import Kind, normal

EPS = torch.finfo(torch.float32).eps  # what mmsegmentation adds to a number of pixels before it divides by it


class LossByFeat(Kind):
    """``BaseDecodeHead.loss_by_feat`` of mmsegmentation 1.x."""

    operator = "upsample_cross_entropy"
    method = "loss_by_feat"

    @classmethod
    def resembles(cls, module: nn.Module) -> bool:
        return hasattr(module, "loss_decode") and callable(getattr(module, cls.method, None))

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        if getattr(module, "align_corners", None) is not False:
            return "its align_corners is not False"
        if getattr(module, "sampler", None) is not None:
            return f"its sampler ({type(module.sampler).__name__}) needs the upsampled logits"
        for criterion in criteria(module):
            name = f"its loss ({type(criterion).__name__})"
            for attribute, value in (("use_sigmoid", False), ("use_mask", False), ("reduction", "mean")):
                found = getattr(criterion, attribute, None)
                if found != value:
                    return f"{name} has {attribute} {found}, the fused operator {value}"
            reason = why_must_be_called(name, criterion)
            if reason is not None:
                return reason
        return None

    @staticmethod
    def trials(twin: nn.Module, dtype: torch.dtype) -> list[tuple]:
        return [
            (logits, [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=label)) for label in labels])
            for logits, labels in logits_and_labels(twin, dtype)
        ]

    @staticmethod
    def fused(self: nn.Module, seg_logits: Tensor, batch_data_samples: list) -> dict[str, Tensor]:
        return losses(self, seg_logits, self._stack_batch_gt(batch_data_samples))


class Losses(LossByFeat):
    """``BaseDecodeHead.losses`` of the official code, which is that of mmsegmentation 0.x."""

    method = "losses"

    @staticmethod
    def trials(twin: nn.Module, dtype: torch.dtype) -> list[tuple]:
        return logits_and_labels(twin, dtype)

    @staticmethod
    def fused(self: nn.Module, seg_logit: Tensor, seg_label: Tensor) -> dict[str, Tensor]:
        return losses(self, seg_logit, seg_label)


def criteria(head: nn.Module) -> list[nn.Module]:
    return list(head.loss_decode) if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]


def losses(head: nn.Module, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Logits [N, C, h, w] and labels [N, 1, H, W] to the losses by name, and "acc_seg", the right pixels in percent."""
    require_unchanged(LossByFeat.why_not, head)
    labels = labels.squeeze(1)
    known = labels != head.ignore_index
    result: dict[str, Tensor] = {}
    for criterion in criteria(head):
        loss = cross_entropy(criterion, logits, labels, known, head.ignore_index)
        name = criterion.loss_name
        result[name] = result[name] + loss if name in result else loss
    right = (upsample_argmax(logits, labels.shape[1:]) == labels) & known
    result["acc_seg"] = (right.sum().view(1).float() + EPS) * (100 / (known.sum(dtype=torch.float32) + EPS))
    return result


def cross_entropy(criterion: nn.Module, logits: Tensor, labels: Tensor, known: Tensor, ignore_index: int) -> Tensor:
    """``CrossEntropyLoss`` of mmsegmentation: unless ``avg_non_ignore``, ignored pixels count in the mean, with a loss of 0."""
    dtype = accumulator(logits.dtype)  # integers would be divided in the default one
    weight, count, total = None, known.sum(dtype=dtype), labels.numel()
    if criterion.class_weight is not None:
        weight = logits.new_tensor(criterion.class_weight, dtype=dtype)
        weights = weight[labels]  # [N, H, W]; as in the original an error where a label is no class
        count, total = (weights * known).sum(), weights.sum()
    if getattr(criterion, "avg_non_ignore", False):
        total = count
    mean = upsample_cross_entropy(logits, labels, ignore_index, weight)
    return criterion.loss_weight * mean * (count / (total + EPS))


def logits_and_labels(head: nn.Module, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """To try a head's loss on, few pixels and many with large logits, some ignored, unless its classes have weights: those
    need a class everywhere."""
    trials = []
    for scale, low, high in ((1, (3, 4), (7, 9)), (100, (5, 6), (64, 64))):
        labels = torch.randint(head.num_classes, (2, 1, *high))
        if all(criterion.class_weight is None for criterion in criteria(head)):
            labels[:, :, 2] = head.ignore_index
        trials.append((scale * normal(2, head.num_classes, *low, dtype=dtype), labels))
    return trials
