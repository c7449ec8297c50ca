"""Hard-concrete gates: random masks with an expected size that gradients reach."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import StageError, require

EPS = 1e-6


class HardConcrete(nn.Module):
    """One gate z in [0, 1] for each of n structures (Louizos, Welling and Kingma 2018, section 2.2):

        s = sigmoid((log(u / (1 - u)) + log_alpha) / beta),   z = clamp(s (r - l) + l, 0, 1),   u ~ U(0, 1)

    with beta = 2/3, l = -0.1, r = 1.1. `log_alpha` starts near log((1 - drop) / drop).
    """

    def __init__(self, n: int, drop: float = 0.01, std: float = 0.01, beta: float = 2 / 3, stretch: float = 0.1):
        super().__init__()
        require(n >= 1, f"gates need at least 1 structure, not {n}")
        require(0 < drop < 1 and std >= 0, f"drop must lie in (0, 1) and std be 0 or more; got {drop} and {std}")
        require(beta > 0 and stretch > 0, f"beta and stretch must be above 0; got {beta} and {stretch}")
        self.beta, self.low, self.high = beta, -stretch, 1 + stretch
        self.log_alpha = nn.Parameter(torch.randn(n) * std + math.log((1 - drop) / drop))

    def sample(self, u: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """z for uniform draws u, with gradient to `log_alpha`."""
        u = u.to(self.log_alpha).clamp(EPS, 1 - EPS)
        s = torch.sigmoid((torch.log(u / (1 - u)) + self.log_alpha) / self.beta)
        return (s * (self.high - self.low) + self.low).clamp(0, 1)

    def kept(self) -> Float[Tensor, " n"]:
        """P(z > 0) = sigmoid(log_alpha - beta log(-l / r)) of each structure; the sum is the expected L0 norm."""
        return torch.sigmoid(self.log_alpha - self.beta * math.log(-self.low / self.high))

    @torch.no_grad()
    def mask(self, least: int = 0) -> Float[Tensor, " n"]:
        """The fixed mask: sigmoid(0.8 log_alpha / beta), of which the round(n - E[L0]) smallest are 0 (as in FLOP, Wang
        et al. 2020, and CoFi, Xia et al. 2022). At least `least` structures stay."""
        n = len(self.log_alpha)
        soft = torch.sigmoid(0.8 * self.log_alpha / self.beta)
        zeros = min(round(n - float(self.kept().sum())), n - least)
        soft[torch.argsort(soft, stable=True)[:zeros]] = 0
        return soft


class Gates(nn.Module):
    """Hard-concrete gates of several groups by name; `least` are the groups' smallest sizes after a cut (0 if absent).

    In training mode `draw` takes one u for every structure, and `gates[name]` are the values z that follow: the same
    for the whole batch, and on all processes if the generator is. In eval mode `gates[name]` is the fixed mask.
    """

    def __init__(self, sizes: Mapping[str, int], drop: float = 0.01, std: float = 0.01,
                 least: Mapping[str, int] | None = None):
        super().__init__()
        self.groups = nn.ModuleDict({name: HardConcrete(n, drop, std) for name, n in sizes.items()})
        self.least = dict(least or {})
        self._u: dict[str, Tensor] = {}

    def draw(self, generator: torch.Generator) -> None:
        """Fresh uniform draws, from a CPU generator, for the next forward pass."""
        for name, gate in self._each():
            self._u[name] = torch.rand(len(gate.log_alpha), generator=generator).to(gate.log_alpha.device)

    def _each(self) -> Iterator[tuple[str, HardConcrete]]:
        for name, gate in self.groups.items():
            assert isinstance(gate, HardConcrete)
            yield name, gate

    def __contains__(self, name: str) -> bool:
        return name in self.groups

    def __getitem__(self, name: str) -> Float[Tensor, " n"]:
        """Raises StageError in training mode before the first `draw`."""
        gate = self.groups[name]
        assert isinstance(gate, HardConcrete)
        if not self.training:
            return gate.mask(self.least.get(name, 0))
        require(name in self._u, "gates in training mode need draws: call gates.draw(run.shared) before the model",
                StageError)
        return gate.sample(self._u[name])

    def kept(self) -> dict[str, Float[Tensor, ""]]:
        """Expected number of structures kept in every group."""
        return {name: gate.kept().sum() for name, gate in self._each()}

    def masks(self) -> dict[str, Float[Tensor, " n"]]:
        """The fixed mask of every group."""
        return {name: gate.mask(self.least.get(name, 0)) for name, gate in self._each()}
