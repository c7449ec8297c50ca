"""`tones`: speech-like words of synthetic speakers.

A word is a sequence of vowels, each with its formants; a speaker has a pitch, a length of the vocal tract (which moves
all formants), a tilt of the spectrum and a pace.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.data.sets import TensorSet
from stillhouse.errors import require

RATE = 4000
VOWELS = torch.tensor([[300.0, 1500.0], [300.0, 800.0], [500.0, 1250.0], [550.0, 900.0], [700.0, 1150.0]])
"""First and second formant in Hz, below the highest frequency that the rate can carry, 2,000 Hz."""
WORDS = 20
SPEAKERS = 16
BANDWIDTH = 90.0
CHUNK = 128
COARSE = 20  # samples between two values of a harmonic's loudness


def vocabulary(words: int = WORDS) -> Int[Tensor, "words three"]:
    """The words as triples of vowels, of which no two neighbours are equal: always the same ones."""
    every = [t for t in itertools.product(range(len(VOWELS)), repeat=3) if t[0] != t[1] and t[1] != t[2]]
    require(1 <= words <= len(every), f"there are 1 to {len(every)} words, not {words}")
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(1))[:words]
    return torch.tensor(every)[order]


def voices(speakers: int = SPEAKERS) -> Float[Tensor, "speakers four"]:
    """Pitch in Hz, factor of the formants, tilt in dB per octave, and pace of each speaker: always the same ones."""
    require(speakers >= 1, f"there must be at least 1 speaker, not {speakers}")
    u = torch.rand(speakers, 4, generator=torch.Generator().manual_seed(2))
    place = torch.arange(speakers) / max(speakers - 1, 1)
    pitch = 90 * (220 / 90) ** place
    return torch.stack([pitch, 0.88 + 0.24 * u[:, 1], -9 + 7 * u[:, 2], 0.85 + 0.3 * u[:, 3]], 1)


def tones(n: int = 1500, seed: int = 0, noise: float = 0.1, seconds: float = 1.0, words: int = WORDS,
          speakers: int = SPEAKERS) -> TensorSet:
    """`n` clips at 4 kHz as `audio` [n, samples] with the labels `word` and `speaker`, drawn with `seed`.

    Each is a word of three vowels that glide into each other, spoken at a place of the clip, at a pitch that wanders
    around the speaker's, in white noise of standard deviation `noise` (the voice has about 0.3 where it is).
    """
    require(n >= 1 and seconds > 0 and noise >= 0, "n must be 1 or more, seconds above 0 and noise not negative; got "
            f"{n}, {seconds} and {noise}")
    generator = torch.Generator().manual_seed(seed)
    word = torch.randint(words, (n,), generator=generator)
    speaker = torch.randint(speakers, (n,), generator=generator)
    spelled, voice = vocabulary(words)[word], voices(speakers)[speaker]
    parts = [_spoken(spelled[i : i + CHUNK], voice[i : i + CHUNK], seconds, generator) for i in range(0, n, CHUNK)]
    audio = torch.cat(parts)
    return TensorSet(audio=audio + noise * torch.randn(audio.shape, generator=generator), word=word, speaker=speaker)


def crops(data: TensorSet, samples: int, seed: int = 0) -> TensorSet:
    """One piece of `samples` of every clip, at a place that is drawn once: the same in every run with this set."""
    length = data.audio.shape[1]
    require(1 <= samples <= length, f"a crop of {samples} samples does not fit clips of {length}")
    start = torch.randint(length - samples + 1, (len(data), 1), generator=torch.Generator().manual_seed(seed))
    return data.with_fields(audio=data.audio.gather(1, start + torch.arange(samples)))


def _spoken(spelled: Tensor, voice: Tensor, seconds: float, generator: torch.Generator) -> Float[Tensor, "n samples"]:
    """Harmonics of the pitch, weighed by the formants at each moment."""
    n = len(spelled)
    time = torch.arange(round(seconds * RATE)) / RATE
    pitch, stretch, tilt, pace = (v[:, None] for v in voice.unbind(1))
    draws = torch.rand(n, 5, generator=generator)
    length = (0.65 * seconds * pace * (0.9 + 0.2 * draws[:, :1])).clamp_max(0.9 * seconds)
    start = draws[:, 1:2] * (seconds - length)
    place = ((time - start) / length).clamp(0, 1)
    formants = stretch[..., None] * VOWELS[spelled]
    at = (3 * place - 0.5).clamp(0, 2)
    glide = torch.sigmoid((at - at.floor() - 0.5) * 12)
    first = at.floor().long().clamp_max(1)
    glide = torch.where(at.floor().long() > 1, torch.ones_like(glide), glide)
    pick = torch.arange(n)[:, None]
    track = formants[pick, first] * (1 - glide)[..., None] + formants[pick, first + 1] * glide[..., None]
    wander = 1 + 0.06 * torch.sin(2 * math.pi * (2 + 2 * draws[:, 2:3]) * time + 6.28 * draws[:, 3:4])
    wander = wander * (1 + 0.08 * (draws[:, 4:5] - 0.5))
    turn = torch.polar(torch.ones_like(wander), 2 * math.pi * torch.cumsum(pitch * wander, 1) / RATE)
    coarse = slice(COARSE // 2, None, COARSE)
    sound, harmonic = torch.zeros(n, len(time)), torch.ones_like(turn)
    for h in range(1, int(RATE / 2 / float(pitch.min())) + 1):
        frequency = (h * pitch * wander)[:, coarse]
        resonance = (1 / (1 + ((frequency[..., None] - track[:, coarse]) / BANDWIDTH).square())).sum(-1)
        loud = resonance * (frequency / 100).pow(tilt / 6.02) * (frequency < 0.48 * RATE)
        harmonic = harmonic * turn
        sound += F.interpolate(loud[:, None], len(time), mode="linear")[:, 0] * harmonic.imag
    envelope = (place * 8).clamp_max(1) * ((1 - place) * 8).clamp_max(1)
    sound = sound * envelope
    return 0.3 * sound / sound.square().sum(1, keepdim=True).div(envelope.square().sum(1, keepdim=True)).sqrt()
