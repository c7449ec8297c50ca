"""Whether a classifier is as often right as it is sure, and the remedy after training.

`stillhouse.evaluate.classification.calibration_error` gives the expected calibration error; logits and labels come from
`predictions` there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import DataError, require
from stillhouse.evaluate.classification import calibration_error, predictions


class Reliability(NamedTuple):
    """Per bin of confidence: how many samples, their mean confidence, and the share that is right (NaN if empty)."""

    samples: Int[Tensor, " bins"]
    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]


def negative_log_likelihood(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
    """-log p(label), in nats, mean over samples."""
    _check(logits, labels)
    return F.cross_entropy(logits.double(), labels).item()


def brier(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
    """sum_c (p_c - [c = label])^2, mean over samples (Brier 1950): between 0 and 2, 1 - 1/classes for equal p."""
    _check(logits, labels)
    p = logits.double().softmax(-1)
    return (p - F.one_hot(labels, p.shape[-1])).square().sum(-1).mean().item()


def reliability(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], bins: int = 15) -> Reliability:
    """A reliability diagram over equally wide bins of the highest probability (Guo et al. 2017, section 2)."""
    _check(logits, labels)
    require(bins >= 1, f"bins must be at least 1, not {bins}")
    confidence, predicted = logits.double().softmax(-1).max(-1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    samples = torch.bincount(place, minlength=bins)
    sums = [torch.bincount(place, weights=x, minlength=bins) for x in (confidence, (predicted == labels).double())]
    return Reliability(samples, *(s / samples for s in sums))


def fit_temperature(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
    """The T > 0 with the lowest NLL of softmax(z / T) on held-out samples (Guo et al. 2017, section 4.2).

    The NLL is convex in 1 / T, so there is one; it is sought between 1/100 and 100. Dividing by it changes no decision.
    """
    from scipy.optimize import minimize_scalar

    _check(logits, labels)
    z = logits.double()

    def nll(log_t: float) -> float:
        return F.cross_entropy(z / math.exp(log_t), labels).item()

    edge = math.log(100)
    return math.exp(float(minimize_scalar(nll, bounds=(-edge, edge), method="bounded", options={"xatol": 1e-6}).x))


def scores(model: nn.Module, data: Any, device: torch.device | str = "cpu", temperature: float = 1.0, bins: int = 15
           ) -> dict[str, float]:
    """`accuracy`, `ece`, `nll` and `brier` of a classifier on a labelled set, its logits divided by `temperature`."""
    logits, labels = predictions(model, data, device=device)
    z = logits / temperature
    return {"accuracy": (z.argmax(-1) == labels).double().mean().item(), "ece": calibration_error(z, labels, bins),
            "nll": negative_log_likelihood(z, labels), "brier": brier(z, labels)}


def reliability_figure(diagram: Reliability, title: str = "") -> Any:
    """A figure of a reliability diagram for `run.picture`: accuracy over confidence, each dot as large as its bin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    some = diagram.samples > 0
    share = (diagram.samples / diagram.samples.sum())[some]
    axes.scatter(diagram.confidence[some].tolist(), diagram.accuracy[some].tolist(), s=(20 + 400 * share).tolist())
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy", title=title)
    return figure


def _check(logits: Tensor, labels: Tensor) -> None:
    require(len(logits) == len(labels) and len(labels) > 0, f"{len(logits)} rows of logits for {len(labels)} labels; "
            "give one label a row, and at least one", DataError)
