"""Patched models in use: hooks, copies, files, casts, autocast, torch.compile and DistributedDataParallel."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from operators import error
from standins import (
    NMF2D,
    SWAPPED,
    Attention,
    CrossEntropyLoss,
    Mlp,
    Network,
    OfficialHead,
    OfficialNMF2D,
    image,
    labels,
    step,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from segnext_kernels import patch, unpatch


@pytest.fixture(autouse=True)
def same_every_time(one_thread):
    torch.manual_seed(0)


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


@pytest.mark.parametrize(("name", "part"), [("conv0_1", nn.Identity()), ("dwconv", nn.Linear(8, 8)), ("act", nn.ReLU())])
def test_parts_that_are_replaced_are_told(name, part):
    module = Attention(8) if name == "conv0_1" else Mlp(8, 8)
    patch(module)
    setattr(module, name, part)
    with pytest.raises(
        RuntimeError, match=f"^{type(part).__name__} took a place in {type(module).__base__.__name__} after it was"
    ):
        module(image())
    unpatch(module)
    assert patch(module).swapped == {}


class Adapted(nn.Module):
    """A convolution with something beside it, as of LoRA."""

    def __init__(self, dwconv: nn.Module) -> None:
        super().__init__()
        self.dwconv, self.beside = dwconv, nn.Conv2d(dwconv.in_channels, dwconv.in_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dwconv(x) + self.beside(x)


def head() -> nn.Module:
    return OfficialHead(8, 5, nn.Identity(), CrossEntropyLoss())


def official_mlp() -> nn.Module:
    return Mlp(8, 8, code="official")


# A patched module, what changes in it, the reason in the error, and what it is called on.
CHANGES = {
    "loss": (head, lambda m: setattr(m, "loss_decode", nn.NLLLoss()), r"its loss \(NLLLoss\) has use_sigmoid None"),
    "hooked loss": (head, lambda m: m.loss_decode.register_forward_hook(print), r"its loss \(CrossEntropyLoss\) has hooks"),
    "corners": (head, lambda m: setattr(m, "align_corners", True), "its align_corners is not False"),
    "sampler": (head, lambda m: setattr(m, "sampler", 1), r"its sampler \(int\)"),
    "wrapped": (official_mlp, lambda m: setattr(m, "dwconv", Adapted(m.dwconv.dwconv)), "its dwconv holds beside as well"),
    "hooked": (official_mlp, lambda m: m.dwconv.register_forward_hook(print), "dwconv has hooks"),
    "tanh": (lambda: Mlp(8, 8), lambda m: setattr(m.act, "approximate", "tanh"), "act is GELU by tanh"),
    "S": (lambda: NMF2D(4), lambda m: setattr(m, "S", 2), "S is 2, the fused operator has 1"),
    "inv_t": (lambda: OfficialNMF2D(4, on_gpu=False), lambda m: setattr(m, "inv_t", 100), "inv_t is 100"),
}


@pytest.mark.parametrize(("make", "change", "reason"), CHANGES.values(), ids=CHANGES)
def test_changes_that_would_be_ignored_are_told(make, change, reason):
    module, given = make(), (torch.randn(2, 5, 3, 4), labels()) if make is head else (image().abs(),)
    assert len(patch(module).swapped) == 1
    run = module.losses if make is head else module
    run(*given)
    change(module)
    with pytest.raises(RuntimeError, match=f"^{type(module).__base__.__name__} was changed after it was patched.*: {reason}"):
        run(*given)
    unpatch(module)
    assert patch(module).swapped == {}


def test_unpatch_does_not_claim_what_it_cannot_do():
    wrapped, other = Network(), Network()
    for network in (wrapped, other):
        patch(network)
    mlp = wrapped.blocks[1].mlp
    mlp.forward = mlp.forward  # as activation checkpointing does
    with pytest.raises(RuntimeError, match=r"^unpatch: the forward of blocks\.1\.mlp was replaced after it was patched"):
        unpatch(wrapped)
    attention = other.blocks[0].attn
    attention.__class__ = type("Sharded", (type(attention),), {})  # as fully_shard does
    with pytest.raises(RuntimeError, match=r"^unpatch: blocks\.0\.attn was made a Sharded after it was patched"):
        unpatch(other)
    for network in (wrapped, other):
        assert set(SWAPPED) <= {*patch(network).left}


class Rebuilt(Attention):
    """It says itself how it is pickled."""

    def __reduce__(self):
        return made_of, (Rebuilt, self.state_dict())


def made_of(cls: type[Attention], state: dict[str, torch.Tensor]) -> Attention:
    module = cls(8)
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_as_the_class_makes_them(make):
    module, x = Rebuilt(8), image()
    assert patch(module).swapped == {"": "msca_strips"}
    twin = make(module)
    assert type(twin) is type(module)
    assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("part", ["conv0_1", "dwconv"])
@pytest.mark.parametrize("how", ["hook", "prune"])
def test_hooks_that_would_not_run_are_told(part, how):
    module = Attention(8) if part == "conv0_1" else Mlp(8, 8)
    patch(module)
    convolution = module.conv0_1 if part == "conv0_1" else module.dwconv
    if how == "hook":
        convolution.register_forward_hook(lambda *_: None)
    else:
        prune.l1_unstructured(convolution, "weight", 0.5)
    with pytest.raises(RuntimeError, match="^Conv2d in .* got hooks, as of pruning, .*: call segnext_kernels.unpatch before"):
        module(image())
    unpatch(module)
    module(image())


@pytest.mark.parametrize("make", [lambda: Attention(8), lambda: Mlp(8, 8)], ids=["Attention", "Mlp"])
def test_one_image_as_convolutions_take_it(make):
    module, x = make(), image()[0]
    plain = module(x)
    patch(module)
    assert error(module(x), plain) <= 1e-5
