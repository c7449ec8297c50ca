"""Sound from disk: a folder of .wav, .flac or .ogg files as one set of clips of equal length."""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.data import arrays
from stillhouse.data.broken import ReadSet, Summary, tolerate
from stillhouse.data.sets import collate
from stillhouse.errors import DataError, MissingExtraError, require

SOUNDS = (".wav", ".flac", ".ogg")


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


def read_sound(path: Path | str, data: bytes | None = None) -> tuple[Float[Tensor, " samples"], int]:
    """The samples of a sound file in [-1, 1], channels averaged, and how many there are in a second.

    .wav files of 8, 16 or 32 bits are read as by `read_wav`, all else by `soundfile`. With `data`, the bytes of the
    file, `path` is what it is called. Raises DataError with the name of the file, MissingExtraError.
    """
    if data is None and Path(path).suffix.lower() == ".wav":
        try:
            return read_wav(path)
        except DataError:
            pass  # floating-point and 24-bit files are read below
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError(f"{path} needs soundfile; install it with: pip install 'stillhouse[data]'") from error
    try:
        values, rate = soundfile.read(str(path) if data is None else io.BytesIO(data), dtype="float32", always_2d=True)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"cannot read the sound {path}: {type(error).__name__}: {error}") from error
    require(len(values) > 0, f"cannot read the sound {path}: it is empty", DataError)
    sound = torch.from_numpy(np.ascontiguousarray(values.mean(1)))
    require(bool(torch.isfinite(sound).all()), f"cannot read the sound {path}: it has NaN or infinite samples",
            DataError)
    return sound, int(rate)


def resampled(sound: Float[Tensor, " given"], have: int, want: int | None) -> Float[Tensor, " samples"]:
    """A sound of `have` samples a second with `want` (None: as it is), by a polyphase filter."""
    if want is None or have == want:
        return sound
    from scipy.signal import resample_poly

    common = math.gcd(have, want)
    return torch.from_numpy(np.ascontiguousarray(
        resample_poly(sound.numpy(), want // common, have // common), dtype=np.float32))


def is_sound(folder: Path) -> bool:
    """Whether a folder has files of sound, searched to any depth."""
    return next((p for p in folder.rglob("*") if p.suffix.lower() in SOUNDS), None) is not None


class SoundFolder:
    """Sounds read from disk one by one, when asked for: `audio` [samples], and `label` where there are classes."""

    def __init__(self, paths: Sequence[Path], samples: int, rate: int | None, labels: Tensor | None,
                 classes: Sequence[str], found: Summary):
        self.paths, self.samples, self.rate = list(paths), samples, rate
        self.labels, self.classes, self.found = labels, tuple(classes), found

    @property
    def fields(self) -> tuple[str, ...]:
        return ("audio",) if self.labels is None else ("audio", "label")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        sound = fitted(resampled(*read_sound(self.paths[index]), self.rate), self.samples)
        label = {} if self.labels is None else {"label": int(self.labels[index])}
        return {"index": index, "audio": sound, **label}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Some items, collated."""
        return collate([self[int(i)] for i in indices])

    def summary(self) -> Summary:
        return self.found


def read_sounds(folder: Path | str, samples: int | None = None, rate: int | None = None,
                limit_broken: float = 0.0) -> Any:
    """`audio` [n, samples] of all sounds of a folder, searched to any depth, in the order of their names.

    Where all lie in subfolders, these are classes: `label`. Sounds are brought to `rate` samples a second (16000 for
    most speech models); without it they must share one, which is kept. Longer sounds are cut to their middle and
    shorter ones padded with silence. What takes more than `stillhouse.data.arrays.IN_MEMORY` bytes stays on disk.

    Raises DataError for a folder without any, more unreadable ones than the part `limit_broken`, rates that differ
    where `rate` is not given, and lengths that differ where `samples` is not given.
    """
    folder = Path(folder).expanduser()
    require(rate is None or rate >= 1, f"rate is a number of samples a second, not {rate}")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SOUNDS and p.is_file())
    require(bool(paths), f"{folder} holds no sounds ({', '.join(SOUNDS)})", DataError)
    kept: list[Path] = []
    sounds: list[Tensor] = []
    lengths: list[int] = []
    rates: set[int] = set()
    broken: dict[Path, str] = {}
    taken = 0
    for path in paths:
        try:
            sound, have = read_sound(path)
        except DataError as error:
            broken[path] = str(error)
            continue
        rates.add(have)
        sound = resampled(sound, have, rate)
        kept.append(path)
        lengths.append(len(sound))
        taken += 4 * (samples or len(sound))
        if taken <= arrays.IN_MEMORY:
            sounds.append(fitted(sound, samples or len(sound)))
    found = Summary(len(paths), broken, "sounds")
    tolerate(found, limit_broken)
    require(bool(kept), f"no sound of {folder} can be read", DataError)
    require(rate is not None or len(rates) == 1, f"the sounds of {folder} have different rates ({sorted(rates)} "
            f"samples a second); bring them to that of the model: {folder}:rate=16000", DataError)
    require(samples is not None or len(set(lengths)) == 1, f"the sounds of {folder} have {len(set(lengths))} different "
            f"lengths ({min(lengths)} to {max(lengths)} samples); give the one to bring them to: size=…", DataError)
    places = [path.relative_to(folder).parts for path in kept]
    classes = sorted({place[0] for place in places}) if all(len(place) > 1 for place in places) else []
    labels = torch.tensor([classes.index(place[0]) for place in places]) if classes else None
    if taken > arrays.IN_MEMORY:
        return SoundFolder(kept, samples or lengths[0], rate, labels, classes, found)
    data = ReadSet(found, audio=torch.stack(sounds), **({} if labels is None else {"label": labels}))
    data.classes = tuple(classes)
    return data


def fitted(sound: Float[Tensor, " given"], samples: int) -> Float[Tensor, " samples"]:
    """The middle of a sound, or the sound and silence after it."""
    start = max(0, (len(sound) - samples) // 2)
    piece = sound[start : start + samples]
    return torch.nn.functional.pad(piece, (0, samples - len(piece)))
