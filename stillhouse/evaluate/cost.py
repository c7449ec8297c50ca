"""What a model costs: parameters, multiply-accumulates, latency, calls."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stillhouse.errors import require
from stillhouse.run import frozen
from stillhouse.run.seeds import preserved


def parameters(model: nn.Module, trainable: bool = False) -> int:
    """Number of parameters, shared ones once; of those with `requires_grad` if `trainable`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def parameters_of(make: Callable[[], nn.Module]) -> int:
    """Number of parameters of the network that a factory makes, without the memory and the draws of making it."""
    with preserved(), torch.device("meta"):
        return parameters(make())


def macs(model: nn.Module, *example: Any) -> int:
    """Multiply-accumulates of one forward pass in matrix products, convolutions and attention (half of the FLOPs)."""
    with frozen(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*example)
    return counter.get_total_flops() // 2


def latency(model: nn.Module, *example: Any, repeats: int = 20) -> float:
    """Median seconds of one forward pass after three to warm up, in eval mode."""
    require(repeats >= 1, f"repeats must be at least 1, not {repeats}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    times = []
    with frozen(model), torch.no_grad():
        for _ in range(repeats + 3):
            _wait(device)
            start = time.perf_counter()
            model(*example)
            _wait(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


@dataclass
class Calls:
    """How often a model was called, and on how many samples in all."""

    calls: int = 0
    samples: int = 0


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[Calls]:
    """Count the model's forward passes; `samples` adds up the length of the first tensor given to each."""
    count = Calls()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count.calls += 1
        first = next((v for v in [*args, *kwargs.values()] if isinstance(v, Tensor)), None)
        count.samples += 0 if first is None or first.dim() == 0 else len(first)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


@dataclass
class Saved:
    """What a forward pass keeps for the backward pass, in bytes; storages that are shared count once."""

    bytes: int = 0


@contextlib.contextmanager
def saved_bytes() -> Iterator[Saved]:
    """Count what autograd keeps in the meantime for a backward pass, weights and inputs included."""
    saved, seen = Saved(), set()

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            saved.bytes += storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield saved


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
