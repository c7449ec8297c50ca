"""Critics c(v, u) of pairs of embeddings, 1-Lipschitz by spectral normalisation."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from stillhouse.errors import require
from stillhouse.parts.heads import identity_linear

CRITICS = ("dot", "bilinear", "mlp")


class UnitProjector(nn.Module):
    """A linear layer and division by the length: embeddings of unit norm. `spectral` divides its weight by its largest
    singular value (which the direction of what comes out sees through the bias alone)."""

    def __init__(self, features: int, out: int, spectral: bool = False):
        super().__init__()
        linear = nn.Linear(features, out)
        self.linear = spectral_norm(linear) if spectral else linear

    def forward(self, h: Float[Tensor, "n features"]) -> Float[Tensor, "n out"]:
        return F.normalize(self.linear(h), dim=-1)


class DotCritic(nn.Module):
    """c(v, u) = v . u"""

    def forward(self, v: Float[Tensor, "*v features"], u: Float[Tensor, "*u features"]) -> Tensor:
        return torch.einsum("...d,...d->...", v, u)


class BilinearCritic(nn.Module):
    """c(v, u) = v . W u; W begins as the identity. With `spectral` sigma(W) <= 1 (one power iteration a forward pass in
    training mode), so for unit u it is 1-Lipschitz in v, and for unit v in u."""

    def __init__(self, features: int, spectral: bool = True):
        super().__init__()
        linear = identity_linear(features, features)
        linear.register_parameter("bias", None)
        self.linear = spectral_norm(linear) if spectral else linear

    def forward(self, v: Float[Tensor, "*v features"], u: Float[Tensor, "*u features"]) -> Tensor:
        W: Any = self.linear.weight
        if v.numel() <= u.numel():
            return torch.einsum("...d,...d->...", v @ W, u)
        return torch.einsum("...d,...d->...", v, u @ W.T)


class MLPCritic(nn.Module):
    """c(v, u): ReLU layers on [v; u]; with `spectral` each has a largest singular value of 1, so the whole is
    1-Lipschitz in [v; u]."""

    def __init__(self, features: int, hidden: int = 128, layers: int = 2, spectral: bool = True):
        super().__init__()
        require(layers >= 1, f"a critic needs at least 1 layer, not {layers}")
        widths = [2 * features, *[hidden] * (layers - 1), 1]
        linears = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        self.layers = nn.ModuleList(spectral_norm(linear) if spectral else linear for linear in linears)

    def forward(self, v: Float[Tensor, "*v features"], u: Float[Tensor, "*u features"]) -> Tensor:
        x = torch.cat(torch.broadcast_tensors(v, u), -1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).squeeze(-1)


def critic(kind: str, features: int, spectral: bool = True) -> nn.Module:
    """The critic of that name: "dot", "bilinear" or "mlp". Raises ConfigError for another."""
    require(kind in CRITICS, f"critic is one of {', '.join(CRITICS)}, not {kind!r}")
    if kind == "dot":
        return DotCritic()
    return BilinearCritic(features, spectral) if kind == "bilinear" else MLPCritic(features, spectral=spectral)


@torch.no_grad()
def largest_singular_values(module: nn.Module) -> list[float]:
    """Of the weight of every linear layer inside, as it is used (in eval mode: without another power iteration)."""
    mode = module.training
    module.eval()
    values = [float(torch.linalg.matrix_norm(m.weight.double(), 2)) for m in module.modules()
              if isinstance(m, nn.Linear)]
    module.train(mode)
    return values
