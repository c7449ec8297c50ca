"""The tokens of any vision transformer: the class token and the patch tokens, after every block and at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import DataError, RoleError, require
from stillhouse.parts.stages import grid_of
from stillhouse.parts.taps import list_taps

Split = dict[str, Tensor]
"""Tokens apart: "cls" [batch, width] and "patch" [batch, patches, width]."""

PREFIXES = ("cls_token", "class_token", "class_embedding", "dist_token", "distillation_token", "register_tokens",
            "reg_token")
"""Names of the parameters, in timm and transformers, that stand before the patches."""


@dataclass(frozen=True)
class TokenPlaces:
    """Where a model's tokens are read: the paths of its `blocks` in their order and of what gives the tokens at the
    `end` (its last norm over all tokens, or else the last block); how many tokens stand before the `patches`."""

    blocks: tuple[str, ...]
    end: str
    prefix: int
    patches: int
    width: int

    def split(self, x: Float[Tensor, "batch tokens width"]) -> Split:
        """The class token (without one the mean of the patches) and the patches; registers are left out."""
        patch = x[:, self.prefix :]
        return {"cls": x[:, 0] if self.prefix else patch.mean(1), "patch": patch}


def token_places(model: nn.Module, image: Float[Tensor, "batch channels height width"]) -> TokenPlaces:
    """Find the column of equal blocks that all return tokens for pictures like `image`; the model is left as it was.

    How many tokens stand before the patches is what the model says (`num_prefix_tokens`) or holds (`PREFIXES`). Raises
    RoleError for a model that has no such column.
    """
    called = {path: shape for path, shape in list_taps(model, image[:2]).items() if len(shape) == 3}
    blocks = _blocks(model, called)
    order = list(called)
    tokens, width = called[blocks[-1]][1:]
    after = order[order.index(blocks[-1]) + 1 :]
    norms = [path for path in after if isinstance(model.get_submodule(path), nn.LayerNorm)
             and called[path][1:] == (tokens, width)]
    prefix = _prefix(model)
    require(prefix < tokens, f"{type(model).__name__} has {tokens} tokens, {prefix} of them before the patches",
            RoleError)
    return TokenPlaces(tuple(blocks), norms[-1] if norms else blocks[-1], prefix, tokens - prefix, width)


def _blocks(model: nn.Module, called: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The longest list of modules of one class, made of several parts, that return tokens of one shape; of equals the
    outermost."""
    best: list[str] = []
    for name, container in model.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential) or len(container) <= len(best):
            continue
        paths = [f"{name}.{child}" if name else child for child, _ in container.named_children()]
        one_kind = len({type(block) for block in container}) == 1
        composite = all(len(list(block.modules())) > 3 for block in container)
        if one_kind and composite and len({called.get(path) for path in paths}) == 1 and paths[0] in called:
            best = paths
    require(bool(best), f"{type(model).__name__} has no column of blocks that return tokens [batch, tokens, width]; "
            "give a vision transformer (an embedded vit, hf:… or timm:…)", RoleError)
    return best


def _prefix(model: nn.Module) -> int:
    for module in model.modules():
        known: Any = getattr(module, "num_prefix_tokens", None)
        if isinstance(known, int):
            return known
    held = [(name.rpartition(".")[2], p) for name, p in model.named_parameters()]
    return sum(p.shape[-2] if p.dim() > 1 else 1 for name, p in held if name in PREFIXES)


def resize_patches(patch: Float[Tensor, "batch patches width"], count: int) -> Float[Tensor, "batch count width"]:
    """The patches of a square grid on another square grid of `count` patches (bilinear, smoothed where it becomes
    smaller); as they are where the numbers agree. Raises DataError where one of the grids is not square."""
    if patch.shape[1] == count:
        return patch
    sides = [grid_of(n) for n in (patch.shape[1], count)]
    require(all(rest == 0 for _, rest in sides), f"{patch.shape[1]} and {count} patches are not both square grids, so "
            "one cannot be laid on the other; give pictures or models of the same patch grid", DataError)
    (old, _), (new, _) = sides
    grid = patch.transpose(1, 2).unflatten(2, (old, old))
    grid = F.interpolate(grid, (new, new), mode="bilinear", antialias=True, align_corners=False)
    return grid.flatten(2).transpose(1, 2)


@torch.no_grad()
def similarity_of(a: Split, b: Split) -> Tensor:
    """Mean cosine similarity of two splits, of class tokens and of patches in equal parts."""
    return torch.stack([F.cosine_similarity(a[kind], b[kind], dim=-1).mean() for kind in ("cls", "patch")]).mean()
