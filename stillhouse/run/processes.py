"""What a run needs of torch.distributed. With one process every function here is the identity."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stillhouse.errors import ConfigError


def connect(device: str) -> torch.device:
    """Join the other processes if launched by torchrun or `accelerate launch`; the device this process works on.

    `device` is "auto", "cpu", "cuda", "cuda:1", "mps" and so on. Raises ConfigError when it is not there.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched or device == "auto":
        from accelerate import PartialState

        return PartialState(cpu=device == "cpu").device
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ConfigError(f"device {device!r} is not available; this machine has: {', '.join(there)}. "
                          "Give one of them with --device, or 'auto'.") from error
    return chosen


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def bounds(total: int) -> tuple[int, int]:
    """The half-open range of `total` ordered samples that belongs to this process."""
    return rank() * total // size(), (rank() + 1) * total // size()


def summed(value: Tensor) -> Tensor:
    """Sum of `value` over the processes, without gradient."""
    if size() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on some process."""
    return flag if size() == 1 else bool(summed(torch.tensor(float(flag), device=device)).item())


def wait(device: torch.device) -> None:
    """Until every process has come here."""
    any_of(False, device)


class Gather(torch.autograd.Function):
    """Concatenate over the processes in rank order; the gradient of a rank's slice collects all ranks' losses.

    `share` is this rank's part of the batch. Averaged gradients weigh rank r by share_r, so the backward pass
    divides by its own share what the weighted losses of all ranks send to its slice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        lengths = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(size())]
        dist.all_gather(lengths, torch.tensor([len(x)], device=x.device))
        ctx.lengths, ctx.share = [int(n) for n in lengths], share
        longest = max(ctx.lengths)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(size())]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, ctx.lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = summed(gradients[0].contiguous() * ctx.share)
        start = sum(ctx.lengths[: rank()])
        return whole[start : start + ctx.lengths[rank()]] / ctx.share, None


class GlobalMean(torch.autograd.Function):
    """sum / count with both added up over the processes; see `Gather` for the share."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, count: Tensor, share: float) -> Tensor:
        both = summed(torch.stack([total.detach(), count.detach().to(total.dtype)]))
        ctx.scale = 1.0 / (both[1].clamp_min(1e-12) * share)
        return both[0] / both[1].clamp_min(1e-12)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.scale, None, None


def average_gradients(parameters: list[torch.nn.Parameter], share: float) -> None:
    """Replace each gradient by its average over the processes, rank r weighing share_r. Absent counts as zero."""
    if size() == 1:
        return
    present = summed(torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device))
    used = [p for p, n in zip(parameters, present.tolist(), strict=True) if n > 0]
    if not used:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() for p in used])
    flat = summed(flat * share)
    offset = 0
    for p in used:
        p.grad = flat[offset : offset + p.numel()].view_as(p).to(p.dtype)
        offset += p.numel()
