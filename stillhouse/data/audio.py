"""Sound from disk: a folder of .wav files as one set of clips of equal length."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.data.sets import TensorSet
from stillhouse.errors import DataError, require


def read_wav(path: Path | str) -> tuple[Float[Tensor, " samples"], int]:
    """The samples of a .wav file in [-1, 1], channels averaged, and how many there are in a second.

    Whole numbers of 8, 16 or 32 bits are understood. Raises DataError with the name of the file.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"cannot read the sound {path}: {type(error).__name__}: {error}") from error
    kinds: dict[int, Any] = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4")}
    require(width in kinds, f"{path} has samples of {8 * width} bits; write it with 16", DataError)
    values = np.frombuffer(raw, kinds[width]).reshape(-1, channels).astype(np.float32).mean(1)
    values = (values - 128) / 128 if width == 1 else values / 2.0 ** (8 * width - 1)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)), rate


def is_sound(folder: Path) -> bool:
    """Whether a folder has .wav files, searched to any depth."""
    return next(folder.rglob("*.wav"), None) is not None


def read_sounds(folder: Path | str, samples: int | None = None) -> TensorSet:
    """`audio` [n, samples] of all .wav files of a folder, searched to any depth, in the order of their names.

    Longer sounds are cut to their middle and shorter ones padded with silence. Raises DataError for a folder without
    any, rates that differ, and lengths that differ where `samples` is not given.
    """
    folder = Path(folder).expanduser()
    paths = sorted(p for p in folder.rglob("*.wav") if p.is_file())
    require(bool(paths), f"{folder} holds no .wav files", DataError)
    sounds, rates = zip(*(read_wav(p) for p in paths), strict=True)
    require(len(set(rates)) == 1, f"the sounds of {folder} have different rates ({sorted(set(rates))} samples a "
            "second); bring them to that of the model", DataError)
    lengths = {len(s) for s in sounds}
    require(samples is not None or len(lengths) == 1, f"the sounds of {folder} have {len(lengths)} different lengths "
            f"({min(lengths)} to {max(lengths)} samples); give the one to bring them to: size=…", DataError)
    return TensorSet(audio=torch.stack([fitted(s, samples or len(s)) for s in sounds]))


def fitted(sound: Float[Tensor, " given"], samples: int) -> Float[Tensor, " samples"]:
    """The middle of a sound, or the sound and silence after it."""
    start = max(0, (len(sound) - samples) // 2)
    piece = sound[start : start + samples]
    return torch.nn.functional.pad(piece, (0, samples - len(piece)))
