"""patch and unpatch: what is found in which code, that nothing else changes, and every reason to leave a module alone."""

from __future__ import annotations

import copy
import io
import pickle
import re

import golden
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from operators import arrange, error, image_layouts
from standins import (
    CODES,
    IGNORED,
    NMF2D,
    Attention,
    Block,
    CrossEntropyLoss,
    Head,
    Mlp,
    Network,
    OfficialHead,
    OfficialNMF2D,
)
from test_model import ZERO_GRADIENTS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune

from segnext_kernels import patch, unpatch
from segnext_kernels.patch import kinds, losses

codes = pytest.mark.parametrize("code", CODES)
SWAPPED = {
    "blocks.0.attn": "msca_strips",
    "blocks.0.mlp": "dwconv_gelu",
    "blocks.1.attn": "msca_strips",
    "blocks.1.mlp": "dwconv_gelu",
    "head": "upsample_cross_entropy",
    "head.ham": "nmf",
}


@pytest.fixture(autouse=True)
def same_every_time(set_threads):
    torch.manual_seed(0)
    set_threads(1)


@pytest.fixture
def double():
    """The codes draw bases in the default dtype, so that a model in float64 needs it to be float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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


@codes
def test_finds_everything(code):
    report = patch(Network(code))
    assert report.swapped == SWAPPED
    assert report.left == {}


@codes
@image_layouts
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_outputs_losses_and_gradients(code, layout, training):
    network = Network(code).train(training)
    images, truth = arrange(image(2, 3, 24, 27), layout), labels()
    expected = step(network, images, truth)
    patch(network)
    assert_close(step(network, images, truth), expected, 1e-5)


@codes
def test_same_in_float64(code, double):
    network = Network(code).double()
    images, truth = image(2, 3, 24, 27), labels()
    expected = step(network, images, truth)
    patch(network)
    assert_close(step(network, images, truth), expected, 1e-9)


def test_golden_model():
    """Values computed with mmsegmentation 1.2.2."""
    network = golden.model()
    for block in network.backbone.modules():
        if hasattr(block, "mlp"):
            dim, hidden = block.mlp.fc1.weight.shape[1::-1]
            plain = Attention(dim).double(), Mlp(dim, hidden, code="official").double()
            plain[0].load_state_dict(block.attn.spatial_gating_unit.state_dict())
            plain[1].load_state_dict(block.mlp.state_dict())
            block.attn.spatial_gating_unit, block.mlp = plain
    images, bases = golden.inputs()
    network.decode_head.hamburger.ham = NMF2D(golden.CONFIG.rank)
    network.decode_head.hamburger.ham._build_bases = lambda B, S, D, R, device=None: bases
    report = patch(network)
    assert list(report.swapped.values()) == 5 * ["msca_strips", "dwconv_gelu"] + ["nmf"]
    golden.loss(network(images)).backward()
    expected = golden.gradients()
    for name in set(expected) - set(ZERO_GRADIENTS):
        assert error(network.get_parameter(name).grad, expected[name]) <= 1e-9, name


def test_nothing_else_changes():
    network = Network().requires_grad_(False)
    network.stem.requires_grad_(True)
    state, parameters = network.state_dict(), dict(network.named_parameters())
    names = [name for name, _ in network.named_modules()]
    random = torch.get_rng_state()
    patch(network)
    assert torch.equal(torch.get_rng_state(), random)
    assert [name for name, _ in network.named_modules()] == names
    assert list(network.state_dict()) == list(state)
    assert all(parameter is parameters[name] for name, parameter in network.named_parameters())
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["stem.weight", "stem.bias"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert isinstance(network.blocks[0].attn, Attention)
    network.load_state_dict(state)


@codes
def test_unpatch_restores(code):
    network = Network(code)
    classes = [type(module) for module in network.modules()]
    insides = [dict(vars(module)) for module in network.modules()]
    images, truth = image(2, 3, 24, 27), labels()
    expected = step(network, images, truth)
    assert unpatch(network) == []
    patch(network)
    assert [type(module) for module in network.modules()] != classes
    assert unpatch(network) == list(SWAPPED)
    assert [type(module) for module in network.modules()] == classes
    assert [list(vars(module)) for module in network.modules()] == [list(inside) for inside in insides]
    assert_close(step(network, images, truth), expected, 0)
    assert patch(network).swapped == SWAPPED


def test_twice_is_once():
    network = Network()
    patch(network)
    classes = [type(module) for module in network.modules()]
    report = patch(network)
    assert report.swapped == {}
    assert report.left == dict.fromkeys(SWAPPED, "it is fused already")
    assert [type(module) for module in network.modules()] == classes


def test_our_own_modules_are_fused_already():
    report = patch(golden.model())
    assert report.swapped == {}
    assert set(report.left.values()) == {"it is fused already"} and len(report.left) == 5


def test_report_is_readable():
    network = Network()
    network.blocks[1].mlp.act = nn.GELU("tanh")
    assert str(patch(network)).splitlines() == [
        "swapped: 5",
        "  blocks.0.attn ... blocks.1.attn (2): msca_strips",
        "  blocks.0.mlp: dwconv_gelu",
        "  head: upsample_cross_entropy",
        "  head.ham: nmf",
        "left alone: 1",
        "  blocks.1.mlp: act is GELU by tanh, the fused operator has the erf form",
    ]
    assert str(patch(Attention(4))).splitlines() == ["swapped: 1", "  the model itself: msca_strips", "left alone: 0"]


def test_only_modules_are_patched():
    for function in (patch, unpatch):
        with pytest.raises(TypeError, match=f"^{function.__name__}: model must be a torch.nn.Module, got dict$"):
            function({})


def test_runs_on_the_operators(monkeypatch):
    """That the other tests compare something: each operator is really called."""
    called = []

    def watch(module, name: str) -> None:
        operator = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: called.append(name) or operator(*args))

    for name in ("msca_strips", "dwconv_gelu", "nmf"):
        watch(kinds, name)
    for name in ("upsample_cross_entropy", "upsample_argmax"):
        watch(losses, name)
    network = Network()
    patch(network)
    called.clear()
    step(network, image(2, 3, 24, 27), labels())
    assert called == 2 * ["msca_strips", "dwconv_gelu"] + ["nmf", "upsample_cross_entropy", "upsample_argmax"]


def test_other_networks_with_strips():
    """Other sizes, names and biases; sizes without compiled kernels run on the reference."""

    class Strips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.local = nn.Conv2d(6, 6, 5, padding="same", groups=6, bias=False)
            for size in (3, 5, 9):
                self.add_module(f"wide{size}", nn.Conv2d(6, 6, (1, size), padding="same", groups=6))
                self.add_module(f"high{size}", nn.Conv2d(6, 6, (size, 1), padding="same", groups=6, bias=False))
            self.mix = nn.Conv2d(6, 6, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            a = self.local(x)
            return x * self.mix(self.high3(self.wide3(a)) + self.high5(self.wide5(a)) + self.high9(self.wide9(a)) + a)

    x = image(2, 6, 11, 8)
    for module in (Strips(), Attention(6, (3, 5, 9)), Attention(6, (31,)), Attention(6, bias=False)):
        parameters = list(module.parameters())
        expected = [module(x), *torch.autograd.grad(module(x).square().sum(), parameters)]
        assert patch(module).swapped == {"": "msca_strips"}
        found = [module(x), *torch.autograd.grad(module(x).square().sum(), parameters)]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"avg_non_ignore": True}, {"loss_weight": 0.4}], ids=str)
@pytest.mark.parametrize("ignored", [0, 3, 24])
def test_every_mean_of_the_loss(options, ignored):
    head = Head(8, 5, NMF2D(4), CrossEntropyLoss(**options), CrossEntropyLoss(**options), CrossEntropyLoss(name="loss_aux"))
    logits, truth = image(2, 5, 6, 7), torch.randint(5, (2, 1, 24, 27))
    truth[:, :, :ignored] = IGNORED
    expected = head.loss(logits, truth)
    assert patch(head).swapped[""] == "upsample_cross_entropy"
    assert set(expected) == {"loss_ce", "loss_aux", "acc_seg"}
    assert_close(head.loss(logits, truth), expected, 1e-5)


@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_weights_of_classes(avg_non_ignore):
    """Where pixels are ignored the original fails, unless the ignored label is a class."""
    head = Head(8, 5, NMF2D(4), CrossEntropyLoss([0.5, 1.0, 2.0, 0.1, 3.0], avg_non_ignore=avg_non_ignore))
    logits, truth = image(2, 5, 6, 7), torch.randint(5, (2, 1, 24, 27))
    fused = copy.deepcopy(head)
    assert patch(fused).swapped[""] == "upsample_cross_entropy"
    assert_close(fused.loss(logits, truth), head.loss(logits, truth), 1e-5)
    head.ignore_index = fused.ignore_index = 3
    assert_close(fused.loss(logits, truth), head.loss(logits, truth), 1e-5)
    with pytest.raises(IndexError):
        fused.loss(logits, labels())


def test_official_nmf_without_a_gpu():
    """Its own forward draws on a GPU, so that only the fused one runs without."""
    x = image().relu()
    official, other = OfficialNMF2D(4).eval(), NMF2D(4).eval()
    patch(official)
    torch.manual_seed(3)
    found = official(x)
    torch.manual_seed(3)
    assert error(found, other(x)) <= 1e-5


def test_bases_of_ones_own():
    """What users do to get the same answer twice."""

    class Fixed(NMF2D):
        def _build_bases(self, B, S, D, R, device=None):
            return F.normalize(torch.rand(1, D, R, generator=torch.Generator().manual_seed(5)), dim=1).expand(B, -1, -1)

    module, x = Fixed(4), image().relu()
    expected = module(x)
    assert patch(module).swapped == {"": "nmf"}
    assert error(module(x).detach(), expected) <= 1e-5
    assert torch.equal(module(x), module(x))


def test_hooks_stay():
    ran = []
    network = Network(drop=0.0)
    attention, mlp = network.blocks[0].attn, network.blocks[0].mlp
    attention.register_forward_pre_hook(lambda *_: ran.append("attention before"))
    attention.conv3.register_forward_hook(lambda *_: ran.append("conv3"))
    attention.register_forward_hook(lambda *_: ran.append("attention"))
    mlp.fc1.register_forward_hook(lambda *_: ran.append("fc1"))
    mlp.drop.register_forward_hook(lambda *_: ran.append("drop"))
    mlp.register_full_backward_hook(lambda *_: ran.append("mlp backward"))
    mlp.dwconv.weight.register_hook(lambda _: ran.append("weight"))
    attention.conv0.weight.register_post_accumulate_grad_hook(lambda _: ran.append("accumulated"))
    assert patch(network).swapped == SWAPPED
    assert ran == []
    step(network, image(2, 3, 24, 27), labels())
    forward, backward = ran[:6], ran[6:]
    assert forward == ["attention before", "conv3", "attention", "fc1", "drop", "drop"]
    assert sorted(backward) == ["accumulated", "mlp backward", "weight"]


def copied_by_file(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)), "file": copied_by_file}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_are_patched_and_independent(make):
    network, images = Network().eval(), image(2, 3, 24, 27)
    patch(network)
    torch.manual_seed(1)
    expected = network(images)
    twin = make(network)
    assert [type(module) for module in twin.modules()] == [type(module) for module in network.modules()]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in network.parameters()}
    torch.manual_seed(1)
    assert torch.equal(twin(images), expected)
    with torch.no_grad():
        network.blocks[0].attn.conv0.weight.zero_()
    torch.manual_seed(1)
    assert torch.equal(twin(images), expected)
    assert unpatch(twin) == list(SWAPPED)
    assert list(patch(network).left) == list(SWAPPED)


def test_shallow_copies_have_parameters_of_their_own():
    """As DataParallel's replicas do."""
    module, x = Attention(8), image()
    patch(module)
    twin = copy.copy(module)
    twin._modules = dict(module._modules, conv3=nn.Conv2d(8, 8, 1))
    assert not torch.allclose(twin(x), module(x))


def test_moved_and_cast():
    network = Network()
    patch(network)
    assert network.double()(image(2, 3, 24, 27).double()).dtype == torch.float64  # where the original mixes dtypes and fails
    assert network.to("meta")(torch.empty(2, 3, 24, 27, dtype=torch.float64, device="meta")).shape == (2, 5, 12, 14)
    network = Network(drop=0.0)
    patch(network)
    x = image()
    expected = network.blocks(x)
    half = network.blocks.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and 0 < error(half.detach(), expected.detach()) <= 0.05


def test_autocast():
    network = Network()
    patch(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(network, image(2, 3, 24, 27), labels())
    assert found["logits"].dtype == torch.bfloat16 and found["loss_ce"].dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters())


def test_compile():
    network, images = Network(drop=0.0).eval(), image(2, 3, 24, 27)
    patch(network)
    torch.manual_seed(1)
    expected = network(images)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    assert error(compiled(images).detach(), expected.detach()) <= 1e-5
    assert patch(compiled).left == {"": "it is compiled: patch before torch.compile"}


def test_distributed_data_parallel():
    network, images, truth = Network(), image(2, 3, 24, 27), labels()
    expected = step(network, images, truth)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(network)
        assert list(patch(parallel).swapped) == [f"module.{name}" for name in SWAPPED]
        torch.manual_seed(1)
        network.zero_grad()
        network.head.loss(parallel(images), truth)["loss_ce"].backward()
    finally:
        dist.destroy_process_group()
    for name, parameter in network.named_parameters():
        assert error(parameter.grad, expected[name]) <= 1e-5, name


@pytest.mark.parametrize(
    "around",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
    ids=["no_grad", "inference_mode", "autocast", "device"],
)
def test_patched_anywhere(around):
    network = Network()
    with around():
        assert patch(network).swapped == SWAPPED
    network = Network().to(torch.float16).to("meta")
    assert patch(network).swapped == SWAPPED


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
    "other arguments": (lambda: Tokens(8, 16), r"its forward could not be tried \(TypeError: .*missing 2 required"),
    "linear": (lambda: linear(Mlp(4, 8)), "fc1 is Linear, not Conv2d"),
    "tanh": (lambda: changed(Mlp(4, 8), act=nn.GELU("tanh")), "act is GELU by tanh, the fused operator has the erf form"),
    "relu": (lambda: changed(Mlp(4, 8), act=nn.ReLU()), "act is ReLU, not GELU"),
    "hook on act": (lambda: hooked(m := Mlp(4, 8), m.act), f"act {SILENT}"),
    "hook on wrapper": (lambda: hooked(m := Mlp(4, 8, code="official"), m.dwconv), f"dwconv {SILENT}"),
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
    classes, random = [type(module) for module in model.modules()], torch.get_rng_state()
    report = patch(model)
    assert report.swapped == {}
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(torch.get_rng_state(), random)
    assert report.left
    assert re.search(f"^({reason})", next(iter(report.left.values()))), str(report)


def test_children_do_not_keep_their_parent_from_being_patched():
    """A network with one odd block: the others are swapped."""
    network = nn.Sequential(Block(8, 0.0, "official"), Squared(8), Block(8, 0.0, "mmsegmentation"))
    report = patch(network)
    assert list(report.swapped) == ["0.attn", "0.mlp", "2.attn", "2.mlp"]
    assert list(report.left) == ["1"]
