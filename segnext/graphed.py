"""Functions on a GPU as CUDA graphs: a thousand kernels launched as one, where launching them one by one takes the host longer
than they take the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 3  # calls in which libraries are loaded, and kernels compiled and chosen


class Graphed:
    """A function of tensors on a GPU, captured as a CUDA graph at its first call, and launched as one from then on.

    Random numbers are drawn as without a graph: what ``torch.manual_seed`` says before a call holds. In inference call it under
    ``torch.no_grad()``, or the captured result keeps all that its gradient would need.

    Args:
        function: must not wait for the GPU, nor read anything that only the host changes.
        model: whose gradients the function adds to, if it does, and whose buffers it changes. At the first call there are no
            gradients. Later the values of parameters, buffers and gradients may change, and gradients may be None, which is
            zero, or elsewhere; parameters and buffers must stay where they are, and the model what it is.

    Call: tensors, which are copied; those of other shapes or dtypes than the first are given to the function as it is.
    Returns: what the function does, in memory that the next call writes to.
    """

    def __init__(self, function: Callable[..., Any], model: nn.Module | None = None) -> None:
        self.function, self.model, self.graph = function, model, None
        self.gradients: list[tuple[nn.Parameter, Tensor]] = []  # where the graph adds to

    def __call__(self, *tensors: Tensor) -> Any:
        if self.graph is None:
            self._capture(tensors)
        elif any(own.shape != given.shape or own.dtype != given.dtype for own, given in zip(self.given, tensors, strict=True)):
            return self.function(*tensors)
        self._put_gradients_back()
        for own, given in zip(self.given, tensors, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.result

    def _capture(self, tensors: tuple[Tensor, ...]) -> None:
        self.given = [tensor.clone() for tensor in tensors]
        device, graph = tensors[0].device, torch.cuda.CUDAGraph()
        # All on one stream, since a parameter's gradient is added up on the stream that first asked for it.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.random.fork_rng([device]), _without_cached_casts(), self._as_before(stream):
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.function(*self.given)
                self._place_gradients()
            # Other threads go on meanwhile, such as the one that gets batches into pinned memory.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.result = self.function(*self.given)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = graph

    @contextmanager
    def _as_before(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Leaves the model's buffers as they were, and gradients of zero."""
        buffers = [] if self.model is None else list(self.model.buffers())
        with torch.cuda.stream(stream):
            before = [buffer.clone() for buffer in buffers]
        yield
        with torch.cuda.stream(stream), torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            for _, place in self.gradients:
                place.zero_()

    def _place_gradients(self) -> None:
        """Those that there are lie like their parameters from now on; the graph's places hold their memory whatever becomes of
        ``grad``."""
        for parameter in () if self.model is None else self.model.parameters():
            if parameter.grad is not None:
                place = torch.zeros_like(parameter)
                parameter.grad = place.detach()
                self.gradients.append((parameter, place))

    def _put_gradients_back(self) -> None:
        """Such as after ``Module.to``, which moves gradients, or ``zero_grad()``, which drops them."""
        for parameter, place in self.gradients:
            if parameter.grad is None:
                place.zero_()
            elif parameter.grad.data_ptr() != place.data_ptr():
                place.copy_(parameter.grad)
            else:
                continue
            parameter.grad = place.detach()


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """An autocast around all this would forget the weights that it has cast, which the graph goes on reading."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
