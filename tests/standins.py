"""Stand-ins in plain PyTorch with the structure of the official code's and mmsegmentation's modules, for the tests of patch."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from operators import error
from torch import Tensor, nn

CODES = ("official", "mmsegmentation")
IGNORED = 255


class Attention(nn.Module):
    """MSCA with branches of any sizes."""

    def __init__(self, dim: int, sizes: tuple[int, ...] = (7, 11, 21), **options) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **options)
        for i, size in enumerate(sizes):
            self.add_module(f"conv{i}_1", nn.Conv2d(dim, dim, (1, size), padding=(0, size // 2), groups=dim, **options))
            self.add_module(f"conv{i}_2", nn.Conv2d(dim, dim, (size, 1), padding=(size // 2, 0), groups=dim, **options))
        self.conv3 = nn.Conv2d(dim, dim, 1)
        self.branches = len(sizes)

    def strips(self, x: Tensor) -> Tensor:
        a = self.conv0(x)
        return a + sum(getattr(self, f"conv{i}_2")(getattr(self, f"conv{i}_1")(a)) for i in range(self.branches))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.strips(x)) * x


class DWConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float = 0.0, code: str = "mmsegmentation") -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = DWConv(hidden) if code == "official" else DWConv(hidden).dwconv
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.dwconv(self.fc1(x))))))


class NMF2D(nn.Module):
    """mmsegmentation's: the bases are told where to be."""

    def __init__(self, rank: int, spatial_coefficients: int = 1) -> None:
        super().__init__()
        self.S, self.R = spatial_coefficients, rank
        self.train_steps, self.eval_steps = 6, 7
        self.inv_t = 1
        self.rand_init = True

    def _build_bases(self, B: int, S: int, D: int, R: int, device: torch.device | None = None) -> Tensor:
        return F.normalize(torch.rand(B * S, D, R).to(device), dim=1)

    def start(self, batch: int, rows: int, x: Tensor) -> Tensor:
        return self._build_bases(batch, self.S, rows, self.R, device=x.device)

    def local_step(self, x: Tensor, bases: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
        coef = self.compute_coef(x, bases, coef)
        return bases * torch.bmm(x, coef) / (torch.bmm(bases, torch.bmm(coef.mT, coef)) + 1e-6), coef

    def compute_coef(self, x: Tensor, bases: Tensor, coef: Tensor) -> Tensor:
        return coef * torch.bmm(x.mT, bases) / (torch.bmm(coef, torch.bmm(bases.mT, bases)) + 1e-6)

    def forward(self, x: Tensor, return_bases: bool = False) -> Tensor:
        flat = x.reshape(x.shape[0] * self.S, x.shape[1] // self.S, -1)
        bases = self.start(x.shape[0], flat.shape[1], x)
        coef = F.softmax(self.inv_t * torch.bmm(flat.mT, bases), dim=-1)
        for _ in range(self.train_steps if self.training else self.eval_steps):
            bases, coef = self.local_step(flat, bases, coef)
        return torch.bmm(bases, self.compute_coef(flat, bases, coef).mT).view(x.shape)


class OfficialNMF2D(NMF2D):
    """The official one: its forward always draws the bases on the GPU, and so needs one (``on_gpu``)."""

    def __init__(self, rank: int, on_gpu: bool = True) -> None:
        super().__init__(rank)
        self.spatial, self.D, self.eta, self.on_gpu = True, 512, 0.9, on_gpu

    def _build_bases(self, B: int, S: int, D: int, R: int, cuda: bool = False) -> Tensor:
        bases = torch.rand(B * S, D, R)
        return F.normalize(bases.cuda() if cuda else bases, dim=1)

    def start(self, batch: int, rows: int, x: Tensor) -> Tensor:
        return self._build_bases(batch, self.S, rows, self.R, cuda=self.on_gpu)


class CrossEntropyLoss(nn.Module):
    def __init__(self, class_weight=None, loss_weight=1.0, avg_non_ignore=False, name="loss_ce") -> None:
        super().__init__()
        self.use_sigmoid = self.use_mask = False
        self.reduction, self.loss_weight, self.loss_name = "mean", loss_weight, name
        self.class_weight, self.avg_non_ignore = class_weight, avg_non_ignore

    def forward(self, logits: Tensor, label: Tensor, weight: Tensor | None = None, ignore_index: int = -100) -> Tensor:
        class_weight = None if self.class_weight is None else logits.new_tensor(self.class_weight)
        losses = F.cross_entropy(logits, label, class_weight, ignore_index=ignore_index, reduction="none")
        counted = torch.ones_like(label, dtype=losses.dtype) if class_weight is None else class_weight[label]
        if self.avg_non_ignore:
            counted = counted * (label != ignore_index)
        if weight is not None:
            losses = losses * weight
        return self.loss_weight * losses.sum() / (counted.sum() + torch.finfo(torch.float32).eps)


class Head(nn.Module):
    """A decode head with a matrix decomposition; the losses as in ``BaseDecodeHead`` of mmsegmentation 1.x."""

    def __init__(self, dim: int, num_classes: int, ham: nn.Module, *criteria: nn.Module) -> None:
        super().__init__()
        self.align_corners, self.ignore_index, self.sampler, self.num_classes = False, IGNORED, None, num_classes
        self.loss_decode = criteria[0] if len(criteria) == 1 else nn.ModuleList(criteria)
        self.ham_in, self.ham, self.ham_out = nn.Conv2d(dim, dim, 1), ham, nn.Conv2d(dim, dim, 1)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(dim, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x + self.ham_out(self.ham(F.relu(self.ham_in(x)))))
        return self.conv_seg(self.dropout(x))

    def _stack_batch_gt(self, samples: list) -> Tensor:
        return torch.stack([sample.gt_sem_seg.data for sample in samples])

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list) -> dict[str, Tensor]:
        return self.all_losses(seg_logits, self._stack_batch_gt(batch_data_samples))

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self.loss_by_feat(logits, [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=label)) for label in labels])

    def all_losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = F.interpolate(logits, labels.shape[2:], mode="bilinear", align_corners=self.align_corners)
        weight = None if self.sampler is None else self.sampler.sample(logits, labels)
        labels, losses = labels.squeeze(1), {}
        for criterion in self.loss_decode if isinstance(self.loss_decode, nn.ModuleList) else [self.loss_decode]:
            loss = criterion(logits, labels, weight=weight, ignore_index=self.ignore_index)
            losses[criterion.loss_name] = losses.get(criterion.loss_name, 0) + loss
        known = labels != self.ignore_index
        eps = torch.finfo(torch.float32).eps
        losses["acc_seg"] = ((logits.argmax(1) == labels)[known].float().sum(0, keepdim=True) + eps) * (
            100 / (labels[known].numel() + eps)
        )
        return losses


class OfficialHead(Head):
    """The losses as in mmsegmentation 0.x, where they have another name and take the labels."""

    loss_by_feat = None

    def losses(self, seg_logit: Tensor, seg_label: Tensor) -> dict[str, Tensor]:
        return self.all_losses(seg_logit, seg_label)

    loss = losses


class Block(nn.Module):
    def __init__(self, dim: int, drop: float, code: str) -> None:
        super().__init__()
        self.norm1, self.attn = nn.BatchNorm2d(dim), Attention(dim)
        self.norm2, self.mlp = nn.BatchNorm2d(dim), Mlp(dim, 4 * dim, drop, code)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Network(nn.Module):
    """A small segmentation network of two blocks and the head, as one of the two codes has it."""

    def __init__(self, code: str = "mmsegmentation", drop: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(8, drop, code), Block(8, drop, code))
        if code == "official":
            self.head = OfficialHead(8, 5, OfficialNMF2D(4, on_gpu=False), CrossEntropyLoss())
        else:
            self.head = Head(8, 5, NMF2D(4), CrossEntropyLoss())

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)))


# what patch finds in a Network
SWAPPED = {
    "blocks.0.attn": "msca_strips",
    "blocks.0.mlp": "dwconv_gelu",
    "blocks.1.attn": "msca_strips",
    "blocks.1.mlp": "dwconv_gelu",
    "head": "upsample_cross_entropy",
    "head.ham": "nmf",
}


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 8, 9, 10))


def labels() -> Tensor:
    labels = torch.randint(5, (2, 1, 24, 27))
    labels[:, :, :3] = IGNORED
    return labels


def step(network: nn.Module, images: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Logits, losses, and gradients of one step, always with the same random numbers."""
    torch.manual_seed(1)
    network.zero_grad()
    images = images.detach().requires_grad_()
    logits = network(images)
    losses = network.head.loss(logits, truth)
    losses["loss_ce"].backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {"logits": logits.detach(), **losses, "images": images.grad, **gradients}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].shape == expected[name].shape and found[name].dtype == expected[name].dtype, name
        assert error(found[name].detach(), expected[name].detach()) <= tolerance, name
