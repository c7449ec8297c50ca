"""How alike the features of two models are, layer by layer: centred kernel alignment over a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.sets import fetch
from stillhouse.errors import DataError, RoleError, require
from stillhouse.measures.relations import gram, hsic, rbf_gram
from stillhouse.parts.stages import pooled, stages_of
from stillhouse.parts.taps import taps
from stillhouse.run import frozen

Kernel = Literal["linear", "rbf"]


@torch.no_grad()
def layer_similarity(
    a: nn.Module,
    b: nn.Module,
    data: Any,
    a_taps: Sequence[str] = (),
    b_taps: Sequence[str] = (),
    kernel: Kernel = "linear",
    batch: int = 256,
    bandwidth: float = 0.5,
    pool: bool = False,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "a_layers b_layers"]:
    """CKA between layers of two models on the pictures of `data`: 1 where one's features are the other's but for
    rotation and scale, about 0 where they have nothing to do with each other.

    Minibatch CKA (Nguyen et al. 2021, equation 2): mean over batches of the unbiased HSIC(K, M), over the root of those
    of HSIC(K, K) and HSIC(M, M); a last batch of fewer than 4 pictures is left out. `kernel` is "linear" or "rbf"
    (sigma = `bandwidth` times the median distance within the batch). Features are flattened, or averaged over their
    places if `pool`. Empty taps: the stages that are found. Both models are in eval mode and left as they were.

    Raises DataError for fewer than 4 pictures, RoleError where no stages are found.
    """
    require(kernel in ("linear", "rbf"), f"kernel is 'linear' or 'rbf', not {kernel!r}")
    require(batch >= 4, f"a batch needs at least 4 pictures, not {batch}")
    require(len(data) >= 4, f"CKA needs at least 4 pictures, got {len(data)}", DataError)
    example = fetch(data, range(2))["image"].to(device)
    paths = []
    for name, model, given in (("first", a, a_taps), ("second", b, b_taps)):
        paths.append(list(given) or list(stages_of(model, example)))
        require(bool(paths[-1]), f"the {name} model has no stages that can be found; name its layers by module paths",
                RoleError)
    sums = torch.zeros(3, len(paths[0]), len(paths[1]), dtype=torch.double)
    with frozen(a, b):
        for start in range(0, len(data), batch):
            rows = range(start, min(start + batch, len(data)))
            if len(rows) < 4:
                break
            image = fetch(data, rows)["image"].to(device)
            ks, ms = (_grams(model, image, where, kernel, bandwidth, pool)
                      for model, where in zip((a, b), paths, strict=True))
            own = [[hsic(g, g, unbiased=True) for g in side] for side in (ks, ms)]
            for i, k in enumerate(ks):
                for j, m in enumerate(ms):
                    sums[:, i, j] += torch.stack([hsic(k, m, unbiased=True), own[0][i], own[1][j]]).cpu()
    cross, first, second = sums
    return cross / (first * second).clamp_min(1e-300).sqrt()


def _grams(model: nn.Module, image: Tensor, paths: Sequence[str], kernel: Kernel, bandwidth: float, pool: bool
           ) -> list[Float[Tensor, "n n"]]:
    with taps(model, paths) as features:
        model(image)
    rows = [pooled(features[p]) if pool else features[p].flatten(1) for p in paths]
    return [gram(x.double()) if kernel == "linear" else rbf_gram(x.double(), bandwidth) for x in rows]


def heat_map(values: Float[Tensor, "rows columns"], rows: Sequence[str], columns: Sequence[str], row_title: str = "",
             column_title: str = "") -> Any:
    """A figure of a matrix of numbers in [0, 1] with its layers' names, for `run.picture`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.7 * len(columns), 1.2 + 0.6 * len(rows)))
    axes = figure.add_subplot()
    axes.imshow(values.tolist(), vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(columns)), list(columns), rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlabel(column_title)
    axes.set_ylabel(row_title)
    for i, line in enumerate(values.tolist()):
        for j, value in enumerate(line):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    return figure
