"""patch and unpatch: what is found in which code, and that nothing else changes."""

from __future__ import annotations

import copy
import gc
import weakref

import golden
import pytest
import torch
import torch.nn.functional as F
from operators import arrange, error, image_layouts
from standins import (
    CODES,
    IGNORED,
    NMF2D,
    SWAPPED,
    Attention,
    CrossEntropyLoss,
    Head,
    Mlp,
    Network,
    OfficialNMF2D,
    assert_close,
    image,
    labels,
    step,
)
from test_model import ZERO_GRADIENTS
from torch import Tensor, nn

from segnext_kernels import _load, patch, unpatch
from segnext_kernels.patch import kinds, losses

codes = pytest.mark.parametrize("code", CODES)


@pytest.fixture(autouse=True)
def same_every_time(one_thread):
    torch.manual_seed(0)


@pytest.fixture
def double():
    """The codes draw bases in the default dtype, so that a model in float64 needs it to be float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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


def test_nothing_else_changes(set_threads):
    network = Network().requires_grad_(False)
    network.stem.requires_grad_(True)
    state, parameters = network.state_dict(), dict(network.named_parameters())
    names = [name for name, _ in network.named_modules()]
    random = torch.get_rng_state()
    set_threads(3)
    patch(network)
    assert torch.get_num_threads() == 3
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


def test_report_is_readable(monkeypatch):
    monkeypatch.setattr(_load, "failure", None)
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
    assert str(patch(Attention(4, (3, 5)))).splitlines()[3:] == [
        "swapped, but still in plain PyTorch: 1",
        "  the model itself: the compiled kernels have branch sizes (7, 11, 21), got (3, 5)",
    ]


def test_what_no_kernel_serves_is_told(monkeypatch):
    monkeypatch.setattr(_load, "failure", "they were not built")
    assert patch(Network()).uncompiled == dict.fromkeys(SWAPPED, "they were not built")
    on_meta = patch(Network().to("meta")).uncompiled
    assert on_meta.keys() == set(SWAPPED) and all("x is on meta" in reason for reason in on_meta.values())


def test_lazy_parameters_say_nothing_of_kernels():
    network = nn.Sequential(nn.LazyConv2d(4, 1), Network())
    assert patch(network).swapped.keys() == {f"1.{name}" for name in SWAPPED}


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


@pytest.mark.parametrize("ignored", [0, 3, 4, 10, 255])
@pytest.mark.parametrize("weight", [0.4, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_are_found_to_be_the_same(ignored, weight, dtype, double):
    """Shares of pixels are no numbers of the default dtype, whichever that is."""
    head = Head(8, 11, NMF2D(4), CrossEntropyLoss(loss_weight=weight))
    head.ignore_index = ignored
    torch.set_default_dtype(dtype)
    assert patch(head).swapped[""] == "upsample_cross_entropy"


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


def test_modules_that_only_look_odd():
    """Convolutions in a list too, a dict of one's own, and one that is parametrized, which goes on being called."""

    class Config(dict):
        def __init__(self, **options) -> None:
            super().__init__(options)

    class Listed(Attention):
        def __init__(self) -> None:
            super().__init__(8)
            self.all, self.itself = [self.conv0_1, {"conv0": self.conv0}], {}
            self.itself["me"] = self
            self.config = Config(a=[1])

        def train(self, mode: bool = True) -> None:
            super().train(mode)

        def strips(self, x: Tensor) -> Tensor:
            a = self.all[1]["conv0"](x)
            return a + sum(getattr(self, f"conv{i}_2")(getattr(self, f"conv{i}_1")(a)) for i in range(self.branches))

    assert patch(Listed()).swapped == {"": "msca_strips"}
    mlp = Mlp(8, 16)
    nn.utils.parametrizations.weight_norm(mlp.fc1)
    assert patch(mlp).swapped == {"": "dwconv_gelu"}


def test_trials_leave_modules_in_lists_alone():
    class Counter(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.watch = [Counter()]

        def forward(self, x: Tensor) -> Tensor:
            return self.watch[0](x)

    model = Mlp(8, 16)
    model.drop = Watched()
    assert patch(model).swapped
    assert model.drop.watch[0].calls == 0


def test_patched_classes_are_freed():
    class Own(Mlp):
        table = torch.zeros(1)

    model, known = Own(8, 16), weakref.ref(Own)
    assert patch(model).swapped
    unpatch(model)
    del model, Own
    gc.collect()
    assert known() is None
