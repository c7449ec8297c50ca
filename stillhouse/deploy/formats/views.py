"""What a target does, as one module with named tensors in and out: the form in which it is exported and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.data.dequantise import to_logit
from stillhouse.deploy.targets import About
from stillhouse.errors import DamagedFileError, StillError, require

SIZES = (1, 3, 5)
"""Batch sizes at which what was written is compared with the target."""


@dataclass
class View:
    """`module`, called with tensors in the order of `fields`; `axes` names the axes of each field that may vary.

    `batch(n)` draws an example of n samples with a fixed seed; what varies beside the batch grows with n.
    """

    module: nn.Module
    fields: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]
    batch: Callable[[int], tuple[Tensor, ...]]

    @torch.no_grad()
    def __call__(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        out = self.module(*batch)
        return out if isinstance(out, tuple) else (out,)


@dataclass
class Made:
    """What a format's writer did: how far each thing compared was from the target, the tolerance, the code that loads
    it, and what there is to know."""

    checks: dict[str, float]
    tolerance: float
    code: str
    notes: tuple[str, ...] = ()


@dataclass
class Job:
    """A target to be written into `folder`; `place` is where it was saved, `arch` what builds its network, `steps`
    which sampler of a ladder it is."""

    target: Any
    row: str
    about: About
    place: Path
    folder: Path
    arch: str | None = None
    opset: int | None = None
    steps: int | None = None

    @property
    def view(self) -> View:
        return view_of(self.target, self.row, self.about)


def deviation(found: Any, wanted: Any) -> float:
    """The largest |found - wanted|, in parts of the largest |wanted| (or of 0.001); NaN or inf where shapes or
    non-finite values differ."""
    found, wanted = torch.as_tensor(found).double(), torch.as_tensor(wanted).double()
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3))


def compare(view: View, call: Callable[[tuple[Tensor, ...]], Any]) -> dict[str, float]:
    """The deviation of `call` from the view, at each batch size."""
    found: dict[str, float] = {}
    for n in SIZES:
        batch = view.batch(n)
        try:
            out = call(batch)
        except StillError:
            raise
        except Exception as error:
            raise DamagedFileError(f"what was written does not run on {n} samples ({_shapes(view, batch)}): "
                                   f"{type(error).__name__}: {error}") from error
        for name, got, wanted in zip(view.outputs, out if isinstance(out, tuple | list) else (out,), view(batch),
                                     strict=True):
            found[f"{name}, {n} samples"] = deviation(got, wanted)
    return found


def _shapes(view: View, batch: tuple[Tensor, ...]) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in zip(view.fields, batch, strict=True))


# ---------------------------------------------------------------------------------- modules


class _Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


class _Hidden(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, audio: Tensor) -> Tensor:
        return self.model(audio).last_hidden_state


class _LogProb(nn.Module):
    """log p(x); of pictures without the test of their range, which depends on their values."""

    def __init__(self, density: Any):
        super().__init__()
        self.density = density

    def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        if u is None:
            return self.density.log_prob(x)
        levels = self.density.levels
        share = (((x + 1) / 2 * (levels - 1)).round() + u) / levels
        value, log_det = to_logit(share, self.density.alpha)
        z, inner = self.density.flow(value)
        return -0.5 * (z.flatten(1).square() + math.log(2 * math.pi)).sum(1) + inner + log_det


class _Clusters(nn.Module):
    def __init__(self, clustering: Any):
        super().__init__()
        self.net, self.head = clustering.net, clustering.head

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)[:, self.head].softmax(-1)


class _Posterior(nn.Module):
    """p(d | x), and p(y | x) by the pseudo-inverse of W, which is fixed."""

    inverse: Tensor

    def __init__(self, classes: Any):
        super().__init__()
        from stillhouse.measures.label_shift import class_posterior

        self.discriminator = classes.discriminator
        r = classes.W.shape[1]
        self.register_buffer("inverse", class_posterior(torch.eye(r).to(classes.W), classes.W))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        domains = self.discriminator(image).softmax(1)
        return domains, domains @ self.inverse


class _Sampler(nn.Module):
    def __init__(self, sampler: Any, renoise: bool, conditional: bool):
        super().__init__()
        self.sampler, self.denoiser = sampler, sampler.denoiser
        self.renoise, self.conditional = renoise, conditional

    def forward(self, noise: Tensor, *rest: Tensor) -> Tensor:
        condition = rest[-1] if self.conditional else None
        if not self.renoise:
            return self.sampler(noise, condition)
        drawn = iter(rest[0].unbind(1))
        return self.sampler(noise, condition, lambda x: next(drawn))


class _Positional(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs)


# ---------------------------------------------------------------------------------- views


def view_of(target: Any, row: str, about: About) -> View:
    """The view of a target of the row `row` of `export.TABLE`. Raises DamagedFileError where target.json does not say
    what one sample looks like."""
    if row == "QuantizedModel":
        return view_of(target.model, about.kind or "Classifier", about)
    if row in ("TextClassifier", "TextEncoder", "CausalLM"):
        return _text_view(target, row, about)
    if row in ("SpeechEncoder", "Pruned"):
        length = _shape(about, "audio")[0]
        return View(_Hidden(target), ("audio",), ("last_hidden_state",), {"audio": {0: "batch", 1: "samples"}},
                    lambda n: (_normal(n, length + 160 * (n - 1)),))
    if row == "Density":
        return _density_view(target, about)
    if row in ("Denoiser", "FewStepSampler"):
        return _diffusion_view(target, row, about)
    shape = _shape(about, "image")
    module: nn.Module = {"Clustering": _Clusters, "LatentClasses": _Posterior}.get(row, lambda m: m)(target)
    outputs = {"Clustering": ("probabilities",), "LatentClasses": ("domains", "posterior"), "Classifier": ("logits",),
               "VectorClassifier": ("logits",), "LabelAugmented": ("logits",)}.get(row, ("features",))
    return View(module, ("image",), outputs, {"image": {0: "batch"}}, lambda n: (_normal(n, *shape),))


def _text_view(target: Any, row: str, about: About) -> View:
    length, vocabulary = _shape(about, "input_ids")[0], int(target.config.vocab_size)
    positions = getattr(target.config, "max_position_embeddings", None) or 1 << 30

    def batch(n: int) -> tuple[Tensor, ...]:
        long = max(2, min(length + 2 * (n - 3), positions - 2))
        mask = torch.ones(n, long, dtype=torch.long)
        mask[1:2, -1:] = 0
        return torch.randint(0, vocabulary, (n, long), generator=_generator(n)), mask

    fields = ("input_ids", "attention_mask")
    module = _Logits(target) if row == "CausalLM" else target
    return View(module, fields, ("features" if row == "TextEncoder" else "logits",),
                {name: {0: "batch", 1: "length"} for name in fields}, batch)


def _density_view(target: Any, about: About) -> View:
    shape = _shape(about, "x")
    module: nn.Module = _LogProb(target)
    if not getattr(target, "levels", 0):
        return View(module, ("x",), ("log_prob",), {"x": {0: "batch"}}, lambda n: (_normal(n, *shape),))
    return View(module, ("x", "u"), ("log_prob",), {"x": {0: "batch"}, "u": {0: "batch"}},
                lambda n: (_normal(n, *shape).clamp(-1, 1), _uniform(n, *shape)))


def _diffusion_view(target: Any, row: str, about: About) -> View:
    shape, condition = _shape(about, "x"), about.example.get("condition")
    more = () if condition is None else ("condition",)

    def conditions(n: int) -> tuple[Tensor, ...]:
        if condition is None:
            return ()
        return (_normal(n, *condition),) if condition else (torch.arange(n) % 2,)

    if row == "Denoiser":
        fields = ("x", "t", *more)
        return View(_Positional(target), fields, ("x0",), {name: {0: "batch"} for name in fields},
                    lambda n: (_normal(n, *shape), 0.1 + 0.8 * _uniform(n), *conditions(n)))
    renoise = target.mode != "ddim" and target.steps > 1
    fields = ("noise", *("renoise",) * renoise, *more)

    def batch(n: int) -> tuple[Tensor, ...]:
        again = (_normal(n, target.steps - 1, *shape),) * renoise
        return (_normal(n, *shape), *again, *conditions(n))

    return View(_Sampler(target, renoise, bool(more)), fields, ("x",), {name: {0: "batch"} for name in fields}, batch)


def _shape(about: About, field: str) -> list[int]:
    shape: Mapping[str, list[int]] = about.example
    require(field in shape, f"target.json does not say what one sample of '{field}' looks like, which an example batch "
            "is made from; it is written by a run on data", DamagedFileError)
    return shape[field]


def _generator(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + n)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator(shape[0]))


def _uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=_generator(shape[0]))
