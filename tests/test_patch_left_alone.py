"""patch: every reason to leave a module alone."""

from __future__ import annotations

import random
import re

import pytest
import torch
import torch.nn.functional as F
from standins import NMF2D, Attention, Block, CrossEntropyLoss, Head, Mlp, OfficialHead, OfficialNMF2D
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from segnext_kernels import patch

pytestmark = pytest.mark.usefixtures("one_thread")


def strips(**changes) -> Attention:
    """An attention whose first row filter differs in one respect."""
    module = Attention(8)
    options = {"kernel_size": (1, 7), "padding": (0, 3), "groups": 8} | changes
    module.conv0_1 = nn.Conv2d(8, 8, **options)
    return module


def with_child(module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    module.add_module(name, child)
    return module


def changed(module: nn.Module, **attributes) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def hooked(module: nn.Module, child: nn.Module, register: str = "register_forward_hook") -> nn.Module:
    getattr(child, register)(lambda *_: None)
    return module


def on_child(module: nn.Module, name: str, change) -> nn.Module:
    """The module after ``change(child)``, which alters the child in place."""
    change(module.get_submodule(name))
    return module


class NoDevice(NMF2D):
    def _build_bases(self, B, S, D, R):
        return super()._build_bases(B, S, D, R)

    def start(self, batch: int, rows: int, x: Tensor) -> Tensor:
        return self._build_bases(batch, self.S, rows, self.R).to(x.device)


class TransposedBases(NMF2D):
    def _build_bases(self, B, S, R, D, device=None):
        return super()._build_bases(B, S, D, R, device)

    def start(self, batch: int, rows: int, x: Tensor) -> Tensor:
        return self._build_bases(batch, self.S, self.R, rows, device=x.device)


class SharedBases(NMF2D):
    def start(self, batch: int, rows: int, x: Tensor) -> Tensor:
        return self._build_bases(1, self.S, rows, self.R, device=x.device).expand(batch, -1, -1)


class Squared(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x


class Watched(Attention):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = super().forward(x)
        return self.seen


class Detached(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.strips(x)) * x.detach()


class NoisyInTraining(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 if self.training else x)


class Tokens(Mlp):
    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return super().forward(x.mT.unflatten(2, (height, width)))


class ColumnsFirst(Attention):
    def strips(self, x: Tensor) -> Tensor:
        a = self.conv0(x)
        return a + sum(getattr(self, f"conv{i}_1")(getattr(self, f"conv{i}_2")(a)) for i in range(self.branches))


class Optional(Attention):
    def forward(self, x: Tensor, height: int | None = None) -> Tensor:
        return super().forward(x)


class Twice(Attention):
    """One pair of strips under two names."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, (7, 7))
        self.conv1_1, self.conv1_2 = self.conv0_1, self.conv0_2


class LayerDrop(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and torch.rand(()) < 0.1 else super().forward(x)


class PythonsLayerDrop(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and random.random() < 0.1 else super().forward(x)


class Reseeded(NMF2D):
    def forward(self, x: Tensor, return_bases: bool = False) -> Tensor:
        torch.manual_seed(42)
        return super().forward(x)


class WithBases(NMF2D):
    def forward(self, x: Tensor, return_bases: bool = False) -> Tensor:
        return (super().forward(x), 1) if return_bases else super().forward(x)


class Scaled(Attention):
    """By a buffer that is one until a checkpoint says otherwise."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Counting(Attention):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.latest = [], {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        self.latest["x"] = x
        return super().forward(x)


class Windows(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(Windows, self).forward(rows) for rows in x.split(8, 2)], 2)


class Clamped(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1e4, 1e4)


class WithoutNaN(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nan_to_num(super().forward(x))


class InFloat32(Attention):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class HardPixels(CrossEntropyLoss):
    def forward(self, logits: Tensor, label: Tensor, weight=None, ignore_index: int = -100) -> Tensor:
        losses = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="none").flatten()
        return losses.topk(min(1000, losses.numel())).values.mean()


class Odd(nn.Module):
    def __getattr__(self, name: str):
        return vars(self)[name]


class KMeans(NMF2D):
    def local_step(self, x: Tensor, bases: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
        coef = F.softmax(torch.bmm(x.mT, bases), dim=-1)
        return F.normalize(torch.bmm(x, coef), dim=1), coef


class OneStep(NMF2D):
    """The gradient as the Hamburger paper proposes it."""

    def local_step(self, x: Tensor, bases: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return super().local_step(x, bases, coef)


class OtherEpsilon(NMF2D):
    def compute_coef(self, x: Tensor, bases: Tensor, coef: Tensor) -> Tensor:
        return coef * torch.bmm(x.mT, bases) / (torch.bmm(coef, torch.bmm(bases.mT, bases)) + 1e-5)


class Dice(CrossEntropyLoss):
    def forward(self, logits: Tensor, label: Tensor, weight=None, ignore_index: int = -100) -> Tensor:
        return 1 - (logits.softmax(1).amax(1) * (label != ignore_index)).mean()


class TwoLosses(Head):
    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list) -> dict[str, Tensor]:
        losses = super().loss_by_feat(seg_logits, batch_data_samples)
        return {**losses, "loss_energy": seg_logits.square().mean()}


def head(criterion: nn.Module | None = None, kind: type[Head] = Head) -> Head:
    return kind(8, 5, nn.Identity(), criterion or CrossEntropyLoss())


def linear(mlp: Mlp) -> Mlp:
    return changed(mlp, fc1=nn.Linear(4, 8))


def without(name: str) -> Attention:
    module = Attention(8)
    delattr(module, name)
    return module


SILENT = "has hooks, which would no longer run"
LEFT = {
    "even size": (lambda: strips(kernel_size=(1, 8), padding=(0, 4)), "conv0_1 has the even kernel size 8"),
    "7x7": (
        lambda: changed(Attention(8), conv0=nn.Conv2d(8, 8, 7, padding=3, groups=8)),
        r"conv0 has kernel_size \(7, 7\), the fused operator \(5, 5\)",
    ),
    "column first": (
        lambda: strips(kernel_size=(7, 1), padding=(3, 0)),
        r"conv0_1 has kernel_size \(7, 1\), the fused operator \(1, 7\)",
    ),
    "stride": (lambda: strips(stride=2), r"conv0_1 has stride \(2, 2\), the fused operator \(1, 1\)"),
    "dilation": (
        lambda: strips(dilation=(1, 2), padding=(0, 6)),
        r"conv0_1 has dilation \(1, 2\), the fused operator \(1, 1\)",
    ),
    "dilation, same": (lambda: strips(dilation=(1, 2), padding="same"), r"conv0_1 has dilation \(1, 2\)"),
    "padding": (lambda: strips(padding=(0, 2)), r"conv0_1 has padding \(0, 2\), the fused operator \(0, 3\)"),
    "padding mode": (lambda: strips(padding_mode="reflect"), "conv0_1 has padding_mode reflect, the fused operator zeros"),
    "groups": (lambda: strips(groups=4), "conv0_1 has groups 4, the fused operator 8"),
    "other children": (
        lambda: with_child(Attention(8), "norm", nn.BatchNorm2d(8)),
        "its children are conv0, .* conv3, norm, not a 5x5 convolution, pairs of strips 1xk and kx1, and a 1x1 convolution",
    ),
    "two more children": (
        lambda: with_child(with_child(Attention(8), "norm", nn.BatchNorm2d(8)), "last", nn.Identity()),
        "conv3 has groups 1, the fused operator 8",
    ),
    "missing child": (lambda: without("conv1_2"), "its children are conv0, conv0_1, conv0_2, conv1_1, conv2_1"),
    "forward hook": (lambda: hooked(m := Attention(8), m.conv2_1), f"conv2_1 {SILENT}"),
    "forward pre-hook": (lambda: hooked(m := Attention(8), m.conv0, "register_forward_pre_hook"), f"conv0 {SILENT}"),
    "backward hook": (lambda: hooked(m := Attention(8), m.conv0, "register_full_backward_hook"), f"conv0 {SILENT}"),
    "backward pre-hook": (lambda: hooked(m := Attention(8), m.conv0, "register_full_backward_pre_hook"), f"conv0 {SILENT}"),
    "pruned": (
        lambda: on_child(Attention(8), "conv0", lambda c: prune.random_unstructured(c, "weight", 0.5)),
        f"conv0 {SILENT}",
    ),
    "spectral norm": (
        lambda: on_child(Attention(8), "conv0", parametrizations.spectral_norm),
        "conv0 is .*ParametrizedConv2d, not a plain Conv2d",
    ),
    "spectral norm by hook": (lambda: on_child(Attention(8), "conv0", nn.utils.spectral_norm), f"conv0 {SILENT}"),
    "quantised": (
        lambda: changed(Attention(8), conv0=torch.ao.nn.quantized.Conv2d(8, 8, 5, padding=2, groups=8)),
        "conv0 is torch.ao.nn.quantized.modules.conv.Conv2d, not a plain Conv2d",
    ),
    "lazy": (
        lambda: changed(Attention(8), conv0=nn.LazyConv2d(8, 5, padding=2, groups=8)),
        "conv0 is torch.nn.modules.conv.LazyConv2d",
    ),
    "replaced child's forward": (
        lambda: on_child(Attention(8), "conv0", lambda c: setattr(c, "forward", c.forward)),
        "the forward of conv0 was replaced in the instance",
    ),
    "replaced forward": (lambda: changed(m := Attention(8), forward=m.forward), "its forward was replaced in the instance"),
    "other forward": (lambda: Squared(8), "its forward computes something else: the outputs differ in evaluation"),
    "order of strips": (lambda: ColumnsFirst(8), "its forward computes something else: the outputs differ in evaluation"),
    "other gradient": (lambda: Detached(8), "its forward computes something else: the gradients differ in training"),
    "side effect": (lambda: Watched(8), "its forward sets seen, which the fused one would not"),
    "training": (lambda: NoisyInTraining(8, 16), "its forward computes something else: the outputs differ in training"),
    "other arguments": (lambda: Tokens(8, 16), r"its forward takes \(x, height, width\), the fused one \(x\)"),
    "optional arguments": (lambda: Optional(8), r"its forward takes \(x, height=None\), the fused one \(x\)"),
    "one convolution twice": (lambda: Twice(8), "its forward computes something else: the outputs differ in evaluation"),
    "random": (lambda: LayerDrop(8), "its forward draws or sets random numbers, which the fused one would not"),
    "Python's random": (lambda: PythonsLayerDrop(8), "its forward draws or sets random numbers"),
    "seed": (lambda: Reseeded(4), "its forward draws or sets random numbers"),
    "bases returned": (lambda: WithBases(4), "its forward computes something else: the outputs differ in evaluation"),
    "neutral buffer": (lambda: Scaled(8), "its forward computes something else: the outputs differ in evaluation"),
    "side effects": (lambda: Counting(8), "its forward sets seen, latest, calls, which the fused one would not"),
    "windows": (lambda: Windows(8), "its forward computes something else: the outputs differ in evaluation"),
    "large values": (lambda: Clamped(8), "its forward computes something else: the outputs differ in evaluation"),
    "NaN": (lambda: WithoutNaN(8), "its forward computes something else: the outputs differ in evaluation"),
    "no autocast": (lambda: InFloat32(8), "its forward does something else under autocast"),
    "attributes": (lambda: Odd(), r"it could not be looked at \(KeyError: '.*'\)"),
    "graph": (lambda: torch.fx.symbolic_trace(Attention(8)), "it is a graph of torch.fx"),
    "linear": (lambda: linear(Mlp(4, 8)), "fc1 is Linear, not Conv2d"),
    "tanh": (lambda: changed(Mlp(4, 8), act=nn.GELU("tanh")), "act is GELU by tanh, the fused operator has the erf form"),
    "relu": (lambda: changed(Mlp(4, 8), act=nn.ReLU()), "act is ReLU, not GELU"),
    "hook on act": (lambda: hooked(m := Mlp(4, 8), m.act), f"act {SILENT}"),
    "hook on wrapper": (lambda: hooked(m := Mlp(4, 8, code="official"), m.dwconv), f"dwconv {SILENT}"),
    "beside dwconv": (
        lambda: on_child(Mlp(4, 8, code="official"), "dwconv", lambda d: d.add_module("norm", nn.Identity())),
        "its dwconv holds norm as well",
    ),
    "hook on dwconv": (lambda: hooked(m := Mlp(4, 8, code="official"), m.dwconv.dwconv), f"dwconv {SILENT}"),
    "dwconv of 5x5": (
        lambda: changed(Mlp(4, 8), dwconv=nn.Conv2d(8, 8, 5, padding=2, groups=8)),
        r"dwconv has kernel_size \(5, 5\), the fused operator \(3, 3\)",
    ),
    "no dropout": (
        lambda: on_child(nn.Sequential(Mlp(4, 8)), "0", lambda m: delattr(m, "drop")),
        "its children are fc1, dwconv",
    ),
    "S": (lambda: NMF2D(4, spatial_coefficients=2), "S is 2, the fused operator has 1"),
    "inv_t": (lambda: changed(NMF2D(4), inv_t=100), "inv_t is 100, the fused operator has 1"),
    "not spatial": (lambda: changed(OfficialNMF2D(4), spatial=False), "spatial is False, the fused operator has True"),
    "kept bases": (lambda: changed(NMF2D(4), rand_init=False), "rand_init is False, the fused operator has True"),
    "other decomposition": (lambda: KMeans(4), "its forward computes something else: the outputs differ"),
    "one-step gradient": (lambda: OneStep(4), "its forward computes something else: the gradients differ"),
    "epsilon": (lambda: OtherEpsilon(4), "its forward computes something else: the outputs differ"),
    "bases without a device": (lambda: NoDevice(4), r"its forward could not be tried \(TypeError: .*'device'"),
    "bases transposed": (lambda: TransposedBases(4), r"its forward could not be tried \(ValueError: _build_bases is asked for"),
    "bases shared": (lambda: SharedBases(4), r"its forward could not be tried \(ValueError: _build_bases is asked for"),
    "align_corners": (lambda: changed(head(), align_corners=True), "its align_corners is not False"),
    "sampler": (lambda: changed(head(), sampler=nn.Identity()), r"its sampler \(Identity\) needs the upsampled logits"),
    "sigmoid": (
        lambda: head(changed(CrossEntropyLoss(), use_sigmoid=True)),
        r"its loss \(CrossEntropyLoss\) has use_sigmoid True, the fused operator False",
    ),
    "sum": (
        lambda: head(changed(CrossEntropyLoss(), reduction="sum")),
        r"its loss \(CrossEntropyLoss\) has reduction sum, the fused operator mean",
    ),
    "no cross-entropy": (lambda: head(nn.Identity()), r"its loss \(Identity\) has use_sigmoid None, the fused operator False"),
    "dice": (lambda: head(Dice()), "its loss_by_feat computes something else: the outputs differ"),
    "hook on the loss": (lambda: hooked(h := head(), h.loss_decode), rf"its loss \(CrossEntropyLoss\) {SILENT}"),
    "hard pixels": (lambda: head(HardPixels()), "its loss_by_feat computes something else: the outputs differ in evaluation"),
    "more losses": (lambda: head(kind=TwoLosses), "its loss_by_feat computes something else: the outputs differ"),
    "replaced loss": (
        lambda: changed(h := head(kind=OfficialHead), losses=h.losses),
        "its losses was replaced in the instance",
    ),
    "scripted": (lambda: torch.jit.trace(Attention(8), torch.zeros(1, 8, 4, 4)), "it is compiled by TorchScript"),
    "compiled in place": (
        lambda: on_child(nn.Sequential(Attention(8)), "0", nn.Module.compile),
        "it is compiled: patch before",
    ),
}


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_left_alone(make, reason):
    model = make()
    classes, states = [type(module) for module in model.modules()], (torch.get_rng_state(), random.getstate())
    report = patch(model)
    assert report.swapped == {}
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert report.left
    assert re.search(f"^({reason})", next(iter(report.left.values()))), str(report)


def test_children_do_not_keep_their_parent_from_being_patched():
    """A network with one odd block: the others are swapped."""
    network = nn.Sequential(Block(8, 0.0, "official"), Squared(8), Block(8, 0.0, "mmsegmentation"))
    report = patch(network)
    assert list(report.swapped) == ["0.attn", "0.mlp", "2.attn", "2.mlp"]
    assert list(report.left) == ["1"]


def test_a_trial_leaves_nothing_behind():
    module = Counting(8)
    patch(module)
    assert (module.calls, module.seen, module.latest) == (0, [], {})


class Queue(nn.Module):
    """A child without elements, which is false."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("past", torch.zeros(3))
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))

    def __len__(self) -> int:
        return 0


def test_a_trial_changes_no_empty_child():
    module = with_child(Mlp(8, 16).train(), "drop", nn.Sequential())
    module.fc1.add_module("queue", Queue())
    assert patch(module).swapped == {"": "dwconv_gelu"}
    assert all(child.training for child in module.modules())
    queue = module.fc1.queue
    assert not queue.past.any() and queue.scale.dtype == torch.bfloat16 and bool((queue.scale == 1).all())


def test_nothing_is_patched_where_something_cannot_be_looked_at():
    """``groups`` alone make no convolution; and what fails to be looked at is left, not the rest."""
    network = nn.ModuleList([Attention(8), nn.Sequential(nn.ChannelShuffle(2)), nn.Sequential(Odd())])
    assert patch(network).swapped == {"0": "msca_strips"}
