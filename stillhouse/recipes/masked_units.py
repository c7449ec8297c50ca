"""Masked prediction of units: how HuBERT is pre-trained (Hsu et al. 2021), in its first iteration.

Frames of a spectrum are clustered by k-means; the network sees the sound with spans of its frames replaced by one
learned vector, and predicts the cluster of every masked frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from stillhouse.data.sets import TensorSet, column
from stillhouse.errors import RoleError, require
from stillhouse.protocols import SpeechData, SpeechEncoder
from stillhouse.run import Run, begin, set_lr
from stillhouse.run.schedules import warmup_linear


@dataclass(frozen=True)
class Config:
    """Settings of `train`."""

    steps: int = 250_000  # optimizer steps
    batch: int = 32  # clips a step
    units: int = 100  # k of k-means
    window: int = 400  # samples of the spectrum's window
    mask: float = 0.08  # probability that a span starts at a frame
    span: int = 10  # frames of a masked span
    lr: float = 5e-4  # peak learning rate, linear to 0
    warmup: float = 0.08  # part of the steps in which the learning rate rises
    clip: float = 1.0  # global gradient norm

    def __post_init__(self) -> None:
        require(self.steps >= 0 and self.batch >= 1, f"steps and batch must be positive: {self.steps}, {self.batch}")
        require(self.units >= 2 <= self.window, f"units and window must be 2 or more: {self.units}, {self.window}")
        require(0 < self.mask < 1 and self.span >= 1, f"mask lies in (0, 1) and span is 1 or more: {self.mask}, "
                f"{self.span}")


def stride_of(model: Any) -> int:
    """Samples between two frames of a speech encoder of `transformers`."""
    return math.prod(model.config.conv_stride)


def spectra(audio: Float[Tensor, "n samples"], window: int, stride: int, frames: int
            ) -> Float[Tensor, "n frames bins"]:
    """Logarithmic magnitudes of the short-time Fourier transform around each frame of an encoder, each clip with mean 0
    and variance 1 in every bin."""
    transform = torch.stft(audio, window, stride, window=torch.hann_window(window, device=audio.device),
                           return_complex=True)
    values = torch.log(transform.abs() + 1e-3).transpose(1, 2)[:, :frames]
    require(values.shape[1] == frames, f"clips of {audio.shape[1]} samples have {values.shape[1]} spectra, the encoder "
            f"{frames} frames", RoleError)
    return (values - values.mean(1, keepdim=True)) / (values.std(1, keepdim=True) + 1e-3)


def cluster(x: Float[Tensor, "n frames bins"], units: int, seed: int) -> Int[Tensor, "n frames"]:
    """The k-means cluster of every frame (scikit-learn, mini-batches)."""
    from sklearn.cluster import MiniBatchKMeans

    flat = x.flatten(0, 1).double().cpu().numpy()
    fitted = MiniBatchKMeans(units, random_state=seed, n_init=3, batch_size=4096).fit(flat)
    return torch.from_numpy(fitted.labels_).long().view(x.shape[:2])


def spans(u: Float[Tensor, "n frames"], start: float, span: int) -> Bool[Tensor, "n frames"]:
    """Masked frames: from each frame with u < `start` on, `span` frames. Each row has at least one."""
    first = (u < start) | (u == u.min(1, keepdim=True).values)
    padded = F.pad(first.float()[:, None], (span - 1, 0))
    return F.max_pool1d(padded, span, 1)[:, 0] > 0


def train(student: SpeechEncoder, data: SpeechData, config: Config = Config(), run: Run | None = None) -> nn.Module:
    """Pre-train a HubertModel in place: cross-entropy of the units of masked frames, mean over frames.

    Raises RoleError for a model without a vector for masked frames (`mask_time_prob` was 0 when it was built).
    """
    run = begin(run)
    run.check(SpeechEncoder, data, student=student)
    model: Any = student
    require(hasattr(model, "masked_spec_embed"), "the model has no vector for masked frames; build it with a "
            "configuration with mask_time_prob > 0", RoleError)
    audio = column(data, "audio")
    with run.aside("frames", model):
        frames = model(audio[:1].to(run.device)).last_hidden_state.shape[1]
    x = spectra(audio, config.window, stride_of(model), frames)
    units = run.once("units", lambda: {"unit": cluster(x, config.units, run.seed)})
    head = nn.Linear(model.config.hidden_size, config.units).to(run.device)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], config.lr, weight_decay=0.01)
    model.train()
    both: Any = TensorSet(audio=audio, unit=units["unit"].cpu())
    for batch in run.loop("masked units", both, batch=config.batch, steps=config.steps, student=model, head=head,
                          optimizer=optimizer):
        set_lr(optimizer, config.lr * warmup_linear(run.progress, config.warmup))
        masked = spans(run.rand(len(batch["audio"]), frames), config.mask, config.span)
        logits = head(model(batch["audio"], mask_time_indices=masked).last_hidden_state[masked])
        losses = F.cross_entropy(logits, batch["unit"][masked], reduction="sum")
        run.update(optimizer, clip=config.clip, ce=run.mean(losses, masked.sum()))
    return model
