"""Matching two language models from their hidden states: `projected_divergence` against TRL's `generalized_jsd_loss` on
whole logits, and against the bare matrix products that neither can avoid. Forward and backward."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillhouse.measures.projected import projected_divergence

CHUNK = 128
REPEATS = 7


class Sizes(NamedTuple):
    tokens: int
    words: int
    width: int


FULL = Sizes(1024, 32_000, 256)


class Inputs(NamedTuple):
    """Hidden states and output projections; those of the student want gradients."""

    teacher: Tensor
    teacher_weight: Tensor
    student: Tensor
    student_weight: Tensor


def inputs_of(sizes: Sizes) -> Inputs:
    """Hidden states and weights whose logits are about standard normal."""
    n, words, d = sizes
    drawn = [torch.randn(shape) / scale for shape, scale in (((n, d), 1.0), ((words, d), d**0.5)) * 2]
    return Inputs(drawn[0], drawn[1], drawn[2].requires_grad_(), drawn[3].requires_grad_())


def ours(given: Inputs) -> Tensor:
    """The Jensen-Shannon divergence, mean over tokens, with its gradients."""
    loss = projected_divergence(*given, kind="jsd", alpha=0.5)
    loss.backward()
    return loss.detach()


def trl(given: Inputs) -> Tensor:
    """The same by TRL on whole logits."""
    loss = trl_loss()((given.student @ given.student_weight.T)[None],
                      (given.teacher @ given.teacher_weight.T)[None], beta=0.5, reduction="sum") / len(given.student)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def bare(given: Inputs, chunk: int = CHUNK) -> None:
    """Both logits, and the products that carry a gradient of their size back, in chunks (which is the faster form)."""
    d_weight = torch.zeros_like(given.student_weight)
    for start in range(0, len(given.student), chunk):
        h, reference = given.student[start:start + chunk], given.teacher[start:start + chunk]
        z = h @ given.student_weight.T
        reference @ given.teacher_weight.T
        z @ given.student_weight
        d_weight.addmm_(z.T, h)


def bare_whole(given: Inputs) -> None:
    """The same with all positions at once."""
    bare(given, len(given.student))


def trl_loss() -> Callable[..., Tensor]:
    """TRL's loss; raises ImportError without TRL."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer
    return GKDTrainer.generalized_jsd_loss


def arms() -> dict[str, Callable[[Inputs], Any]]:
    """The arms that can run here: that of TRL only where it is installed."""
    found: dict[str, Callable[[Inputs], Any]] = {"ours": ours, "bare": bare, "bare, whole": bare_whole}
    try:
        trl_loss()
    except ImportError:
        return found
    return {**found, "trl": trl}


def measure(sizes: Sizes = FULL, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """Seconds of all arms, alternating, and the memory at its peak beyond the inputs, each in a process of its own."""
    torch.manual_seed(0)
    given, chosen = inputs_of(sizes), arms()
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for repeat in range(repeats + 1):
        for name, arm in chosen.items():
            given.student.grad = given.student_weight.grad = None
            start = time.perf_counter()
            arm(given)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    memory = {name: [peak_of(name, sizes)] for name in chosen if not name.startswith("bare")}
    note = (f"JSD with its gradients, {sizes.tokens} tokens x {sizes.words} words x {sizes.width} wide, float32, "
            f"{torch.get_num_threads()} threads")
    return [{"name": "language-model matching, time", "unit": "s", "note": note, "arms": seconds},
            {"name": "language-model matching, peak extra memory", "unit": "MB", "note": note, "arms": memory}]


def peak_of(arm: str, sizes: Sizes) -> float:
    """`peak_here` in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.language", arm, *map(str, sizes)], capture_output=True,
                          text=True, check=True, cwd=Path(__file__).parent.parent,
                          env={**os.environ, "BENCH_THREADS": str(torch.get_num_threads())})
    return json.loads(done.stdout.splitlines()[-1])


def peak_here(arm: str, sizes: Sizes) -> float:
    """MB by which this process grows at most while `arm` runs once."""
    run = arms()[arm]
    run(inputs_of(Sizes(8, 64, 4)))
    given = inputs_of(sizes)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, or the arm would use it unseen
    before = _memory("VmRSS")
    with Path("/proc/self/clear_refs").open("w") as file:
        file.write("5")  # the peak counts from here
    run(given)
    return (_memory("VmHWM") - before) / 1e6


def _memory(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
    torch.manual_seed(0)
    print(json.dumps(peak_here(sys.argv[1], Sizes(*map(int, sys.argv[2:])))))
