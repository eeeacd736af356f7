"""Several processes as torchrun starts them, or one: who am I, sums over all, and batch norms that see the whole batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import DeviceError, SegnextError


class PeerError(SegnextError, RuntimeError):
    """Another process of the same training has ended."""


@contextmanager
def processes(device: str | torch.device) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did, and yields the device of this one.

    With NCCL on GPUs, each process on its own (``LOCAL_RANK``), and gloo elsewhere.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError("there is no GPU that torch can use; --device cpu goes without")
    if not (dist.is_available() and "RANK" in os.environ and "WORLD_SIZE" in os.environ):
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", local_rank())
        if local_rank() >= torch.cuda.device_count():
            raise DeviceError(f"there is no GPU for process {local_rank()}, this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    except RuntimeError as error:  # the group is left as it is: to dissolve it could wait for processes that wait for this one
        if isinstance(error, dist.DistError) or "Connection closed by peer" in str(error):
            raise PeerError("another process of this training ended; its own message says why") from error
        raise
    dist.destroy_process_group()


@contextmanager
def explain_out_of_memory(device: torch.device, ways: str) -> Iterator[None]:
    """Turns the end of the memory into a sentence that names what would take less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise DeviceError(f"the memory of {device} is too small; try {ways}") from error


def rank() -> int:
    return dist.get_rank() if _joined() else 0


def local_rank() -> int:
    """Which of this machine's processes this one is."""
    return int(os.environ.get("LOCAL_RANK", 0)) if "RANK" in os.environ else 0


@contextmanager
def local_main_process_first() -> Iterator[None]:
    """The block runs in the first process of every machine, and then in the others, which find what it fetched."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def world_size() -> int:
    return dist.get_world_size() if _joined() else 1


def barrier() -> None:
    """Waits until all processes are here."""
    if _joined():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, without a gradient; the tensor itself is changed."""
    if _joined():
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(value: Any) -> Any:
    """The first process' value of something that can be pickled, in all of them."""
    if not _joined():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def share_buffers(model: nn.Module) -> None:
    """Gives all processes the first one's buffers, as the means and variances of norms that are not synchronised."""
    if _joined():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def synchronise_norms(model: nn.Module) -> nn.Module:
    """The model with batch norms whose statistics, in training, are of the batch of all processes; one process needs none.

    Parameters and their names stay. On GPUs it is torch's ``SyncBatchNorm``, which serves nothing else.
    """
    if world_size() == 1:
        return model
    if next(model.parameters()).device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over all processes, each with a batch of the same shape, where torch's own doesn't go."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        values = x.float()
        mean = _Sum.apply(values.mean((0, 2, 3))) / world_size()
        centred = values - mean[:, None, None]
        variance = _Sum.apply(centred.square().mean((0, 2, 3))) / world_size()
        with torch.no_grad():
            count = world_size() * x.numel() // x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(1, count - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_reduce_sum(x.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad.contiguous().clone())
