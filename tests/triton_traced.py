"""Traces the operators for a GPU that is not there, as torch.compile does; test_triton_build.py runs it in its own process.

The interpreter's kernels cannot be traced, and autograd would ask for the GPU, so nothing is run: the graphs are looked at.
"""

from __future__ import annotations

import builtins
import symtable
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget

with mock.patch("torch.cuda.device_count", lambda: 1):  # asked at the import, to spare others that of Inductor
    import segnext_kernels as sk

Tensors = tuple[Tensor, ...]


class Driver:
    """As much of a GPU's driver as torch needs to find out what a kernel writes to."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


NMF_BACKWARD = {"finish", "step", "step_backward", "finish_backward", "gradient_of_x"}  # the steps are done again
KERNELS = {
    "msca_strips": ({"strips"}, {"gradients", "reduce"}),
    "dwconv_gelu": ({"activate"}, {"differentiate", "reduce"}),
    "nmf": ({"finish", "step", "approximate"}, NMF_BACKWARD),
    "scale_add": ({"add_scaled"}, {"add_scaled_backward", "reduce"}),
    "upsample_cross_entropy": ({"add_losses", "finish"}, {"add_weights", "keep_log_sum_exps", "gather"}),
    "upsample_argmax": ({"highest"}, set()),
}


def arguments(operator: str, dtype: torch.dtype, larger: bool = False) -> Tensors:
    """Of the two sizes that there are, one graph serves both: no other number of launches, none of the tiles differs."""
    images, rows, columns = (3, 10, 14) if larger else (2, 9, 12)
    classes = 150 if operator == "upsample_cross_entropy" else 5  # so many that all fits into one strip
    x = torch.empty(images, classes, rows, columns, dtype=dtype).to(memory_format=torch.channels_last)
    sizes = [(5, 5)] + [size for k in (7, 11, 21) for size in ((1, k), (k, 1))]
    kept = torch.float32 if dtype == torch.bfloat16 else dtype  # as autocast has it
    filters = [torch.empty(s, dtype=kept) for h, w in sizes for s in ((5, 1, h, w), (5,))]
    return {
        "msca_strips": (x, *filters),
        "dwconv_gelu": (x, torch.empty(5, 1, 3, 3, dtype=kept), filters[1]),
        "nmf": (torch.empty(images, 5, rows, dtype=dtype), torch.empty(images, 5, 3)),
        "scale_add": (x, x.clone(), torch.empty(5, dtype=dtype), torch.ones(images)),
        "upsample_cross_entropy": (x, torch.zeros(images, 8 * rows, 8 * columns, dtype=torch.int64)),
        "upsample_argmax": (x,),
    }[operator]


def calls(operator: str) -> list[tuple[Callable[..., object], set[str]]]:
    """What is called with arguments: the public function and, as autograd would, the operator for backward."""
    backward = getattr(torch.ops.segnext_kernels_triton, f"{operator}_backward", None)
    forward_kernels, backward_kernels = KERNELS[operator]
    forward, back = {
        "msca_strips": (
            lambda x, *w: sk.msca_strips(x, list(w), backend="triton"),
            lambda x, *w: backward(x, x, list(w), True, True),
        ),
        "dwconv_gelu": (
            lambda *a: sk.dwconv_gelu(*a, backend="triton"),
            lambda x, w, b: backward(x, x, w, b, True, True),
        ),
        "nmf": (
            lambda x, b: sk.nmf(x, b, 2, backend="triton"),
            lambda x, b: backward(x, x, b, None, 2, "exact", True, True),
        ),
        "scale_add": (
            lambda *a: sk.scale_add(*a, backend="triton"),
            lambda x, y, s, k: backward(x, y, s, k, True, True),
        ),
        "upsample_cross_entropy": (
            lambda x, t: sk.upsample_cross_entropy(x, t, backend="triton"),
            lambda x, t: backward(x.new_empty((), dtype=torch.float32), x, t, None, 255),
        ),
        "upsample_argmax": (lambda x: sk.upsample_argmax(x, (4 * x.shape[2], 50), backend="triton"), None),
    }[operator]
    return [(forward, forward_kernels), *([(back, backward_kernels)] if back else [])]


def kernels_in(graph: torch.fx.GraphModule) -> set[str]:
    """The names of the kernels that a graph launches."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    nodes = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert not [node for node in graph.graph.nodes if "segnext_kernels" in str(node.target)], "an operator was not seen through"
    kernels = [kernel_side_table.get_kernel(node.kwargs["kernel_idx"]) for node in nodes]
    kernels = [kernel if isinstance(kernel, triton.JITFunction) else kernel.fn for kernel in kernels]  # the autotuner's
    assert not (missing := {name for kernel in kernels for name in left_behind(kernel)}), f"Inductor leaves behind {missing}"
    return {kernel.fn.__name__ for kernel in kernels}


def left_behind(kernel: triton.JITFunction) -> set[str]:
    """The names that a kernel and what it calls use, and that Inductor does not copy with them into the code it writes."""
    from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code

    module = symtable.symtable(user_defined_triton_kernel_transitive_closure_source_code(kernel), kernel.fn.__name__, "exec")
    known = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_assigned() or symbol.is_namespace()}
    return set(global_names(module)) - known - {"triton", "tl"} - set(dir(builtins))


def global_names(scope: symtable.SymbolTable) -> Iterator[str]:
    """Those that the functions below a scope take from the module."""
    for inner in scope.get_children():
        yield from (symbol.get_name() for symbol in inner.get_symbols() if symbol.is_global())
        yield from global_names(inner)


def check(operator: str, dtype: torch.dtype, dynamic: bool) -> None:
    """One graph without breaks launches the kernels by name, and its results look as those of the operator itself.

    A dynamic one does so for other sizes as well.
    """
    leaves = [arguments(operator, dtype, larger) for larger in ((False, True) if dynamic else (False,))]
    for function, kernels in calls(operator):
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, inputs: list[Tensor], graphs=graphs) -> Callable:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=keep))
        traced, eager = (tree_leaves([call(*some) for some in leaves]) for call in (compiled, function))
        assert [(t.shape, t.dtype, t.stride(), t.device) for t in traced] == [
            (t.shape, t.dtype, t.stride(), t.device) for t in eager
        ]
        assert [kernels_in(graph) for graph in graphs] == [kernels], (operator, [kernels_in(graph) for graph in graphs])


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        x = torch.empty(1, 2, 3, 4)
        for operator in KERNELS:
            assert sk.explain(operator, x)["triton"] in ("serves", "could serve"), sk.explain(operator, x)
            check(operator, torch.float32, dynamic=True)
            check(operator, torch.bfloat16, dynamic=False)
            print(operator, "is seen through")


if __name__ == "__main__":
    sys.exit(main())
