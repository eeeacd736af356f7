"""The Triton kernels of dwconv_gelu and msca_strips, as Triton's interpreter runs them on the CPU.

The interpreter takes as long for one lane as for thousands, so that most tests have programs with many channels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import checks
import pytest
import torch
from operators import (
    FUNCTIONS,
    HALVES,
    Sample,
    arrange,
    arranged,
    assert_same,
    check,
    dwconv_gelu_sample,
    error,
    golden,
    grad_like,
    image_layouts,
    interpreted,
    msca_strips_sample,
    results,
)

from segnext_kernels import msca_strips
from segnext_kernels.nn import AttentionModule

pytest.importorskip("triton")
_stencil, _filters, dwconv_gelu_kernels, msca_strips_kernels, msca_strips_backward = (
    importlib.import_module(f"segnext_kernels.{name}")
    for name in (
        "_stencil",
        "msca_strips._filters",
        "dwconv_gelu.triton",
        "msca_strips.triton",
        "msca_strips.triton_backward",
    )
)

SHAPES = [(1, 1, 1, 1), (2, 3, 1, 40), (1, 16, 37, 1), (1, 33, 2, 2), (1, 17, 5, 37)]
EMPTY = [(0, 3, 5, 5), (2, 3, 0, 5), (2, 0, 5, 5)]
REACH = {"msca_strips": 12, "dwconv_gelu": 2}  # there, and for the derivative of GELU there and back
STAGES = [(32, 4), (64, 8), (160, 16), (256, 32), (64, 4), (128, 8), (320, 16), (512, 32)]  # of T and B: channels, stride


@pytest.fixture(params=[msca_strips_sample, dwconv_gelu_sample], ids=["msca_strips", "dwconv_gelu"])
def sample_of(request) -> Callable[..., Sample]:
    return request.param


@pytest.fixture
def cut_into(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the channels, columns and least rows of programs; rows are then cut into as many strips as that allows."""

    def set_sizes(channels: int, columns: int | None = None, least_rows: int = 1 << 20) -> None:
        def cut(shape, _, wanted, **options):
            return _stencil.cut(shape, channels, columns or wanted, **options | {"least_rows": least_rows, "enough": 1 << 20})

        for module in (_filters, dwconv_gelu_kernels):
            monkeypatch.setattr(module, "cut", cut)

    return set_sizes


@interpreted
@image_layouts
def test_operators_take_other_layouts(sample_of, layout, backend):
    """As a traced graph may bring them: what was channels_last when it was traced need not be when it runs."""
    checks.check_other_layouts(arranged(sample_of((2, 17, 5, 9)).to(torch.float32), layout), backend, layout)


@interpreted
@image_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(sample_of, shape, layout, cut_into, backend):
    cut_into(channels=64)
    sample = arranged(sample_of(shape).to(torch.float32), layout)
    check(sample, backend, grad_like(sample.x))


@interpreted
@image_layouts
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(sample_of, dtype, layout, backend):
    sample = arranged(sample_of((1, 3, 2, 9)).to(dtype), layout)
    check(sample, backend, grad_like(sample.x))


@interpreted
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_filters_beside_16_bits(sample_of, dtype, backend):
    sample = sample_of((1, 3, 2, 9)).to(torch.float32)
    sample = sample.with_x(sample.x.to(dtype))
    check(sample, backend, grad_like(sample.x))


@interpreted
@image_layouts
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((1, 3, 2, 90), {"channels": 2, "columns": 64}), ((1, 2, 29, 3), {"channels": 2, "least_rows": 14})],
    ids=["tiles and blocks", "strips"],
)
def test_many_programs(sample_of, shape, sizes, layout, cut_into, backend):
    """Programs that own neither all channels, nor all columns, nor all rows; the last of each not what is left over."""
    cut_into(**sizes)
    sample = arranged(sample_of(shape).to(torch.float32), layout)
    check(sample, backend, grad_like(sample.x))


@interpreted
@image_layouts
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(sample_of, shape, layout, backend):
    sample = arranged(sample_of(shape).to(torch.bfloat16), layout)
    check(sample, backend, grad_like(sample.x))


@interpreted
@image_layouts
def test_layout_is_kept_and_nothing_is_read_outside(sample_of, layout, backend):
    """check_poison computes everything twice as well, and compares bits."""
    sample = arranged(sample_of((1, 5, 2, 7)).to(torch.float32), layout)
    checks.check_layout(sample, backend)
    checks.check_poison(sample, backend)


@interpreted
@pytest.mark.parametrize("needed", [{0}, {1, 2}], ids=["x", "weights"])
def test_only_needed_gradients(sample_of, needed, backend):
    checks.check_needed_gradients(sample_of((1, 3, 2, 5)).to(torch.float32), backend, needed)


@interpreted
@image_layouts
def test_non_finite_pixel_stays_within_reach(sample_of, layout, cut_into, backend):
    cut_into(channels=4)
    sample = arranged(sample_of((1, 2, 15, 27)).to(torch.float32), layout)
    reach, grad_out = REACH[sample.operator], grad_like(sample.x)
    near = torch.zeros(sample.x.shape, dtype=torch.bool)
    near[0, 1, max(1 - reach, 0) : 2 + reach, max(2 - reach, 0) : 3 + reach] = True
    clean = results(sample, backend, grad_out)
    x, grad = sample.x.clone(), grad_out.clone()
    x[0, 1, 1, 2], grad[0, 1, 1, 2] = torch.nan, torch.inf
    got = results(sample.with_x(x), backend, grad)
    for changed, want in zip(got[:2], clean[:2], strict=True):
        assert torch.equal(changed[~near], want[~near])
        assert not changed[0, 1, 1, 2].isfinite()
    assert_same([g[:1] for g in got[2:]], [c[:1] for c in clean[2:]])


@interpreted
@image_layouts
def test_golden(layout, cut_into, backend):
    cut_into(channels=64)
    values = {key: value.to(torch.float32) for key, value in golden("msca/wide/").items()}
    module = AttentionModule(values["x"].shape[1])
    parameters = dict(module.named_parameters())
    module.load_state_dict({name: values[f"param/{name}"] for name in parameters})
    x = arrange(values["x"], layout).requires_grad_()
    y = module.conv3(msca_strips(x, module.strip_weights(), backend=backend)) * x
    y.backward(values["grad_out"])
    errors = {"y": error(y.detach(), values["y"]), "grad_x": error(x.grad, values["grad_x"])}
    errors |= {name: error(parameters[name].grad, values[f"grad/{name}"]) for name in parameters}
    assert {name: e for name, e in errors.items() if e > 1e-5} == {}


@interpreted
def test_registration(sample_of, backend):
    x, *weights = (leaf.detach() for leaf in arranged(sample_of((1, 2, 1, 3)).to(torch.bfloat16), "channels_last").leaves)
    operator = sample_of.__name__.removesuffix("_sample")
    weights = [weights] if operator == "msca_strips" else weights
    operators = torch.ops.segnext_kernels_triton
    torch.library.opcheck(getattr(operators, operator).default, (x, *weights))
    for need in ((True, False), (False, True)):
        arguments = (torch.ones_like(x), x, *weights, *need)
        torch.library.opcheck(
            getattr(operators, f"{operator}_backward").default, arguments, test_utils=("test_schema", "test_faketensor")
        )


@interpreted
def test_gradcheck(sample_of, backend):
    sample = sample_of((1, 2, 2, 3))
    checks.check_gradients_of_float32(lambda *leaves: FUNCTIONS[sample.operator](*leaves, backend=backend), sample.leaves)


@interpreted
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(sample_of, dtype, backend):
    checks.check_autocast(arranged(sample_of((1, 2, 2, 3)).to(torch.float32), "channels_last"), backend, dtype)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [1, 16])
def test_little_more_is_moved_than_must_be(batch, channels_last):
    shapes = [(batch, channels, size // stride, size // stride) for channels, stride in STAGES for size in (512, 1024)]
    forward, backward = msca_strips_kernels.traffic, msca_strips_backward.traffic
    assert {shape: ratio for shape in shapes if (ratio := forward(shape, channels_last)) > 1.5} == {}
    assert {shape: ratio for shape in shapes if (ratio := backward(shape, channels_last)[0]) > 1.5} == {}
