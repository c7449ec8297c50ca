"""Random streams as functions of names: the same (seed, path, step) gives the same draws in every process and run."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derive(*parts: object) -> int:
    """A 63-bit seed from the parts, by blake2b (Python's own hash is salted per process)."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def reseed(seed: int) -> None:
    """Seed the generators that libraries draw from: torch (each device in use), numpy and random."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Leave all those generators as they were found, on exceptions too."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


class Moment:
    """The streams of one moment of a run (a step, or the time between two stages), made when first asked for.

    `samples` is for per-sample draws, `shared` for decisions that the whole batch shares. Neither depends on the
    rank, so every process draws the same numbers from them.
    """

    def __init__(self, *parts: object):
        self.parts = parts
        self.generators: dict[tuple[str, str], torch.Generator] = {}

    def generator(self, purpose: str, device: torch.device) -> torch.Generator:
        key = purpose, str(device)
        if key not in self.generators:
            self.generators[key] = torch.Generator(device).manual_seed(derive(*self.parts, purpose))
        return self.generators[key]
