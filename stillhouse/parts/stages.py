"""The stages of any network: where its features may be read, shallow to deep, as maps or as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import DataError, RoleError, require
from stillhouse.parts.taps import taps

Shape = tuple[int, ...]
MOST = 4
SPACED = (2 / 12, 4 / 12, 10 / 12, 1.0)
"""After which parts of a column of equal blocks the features are read: blocks 2, 4, 10 and 12 of twelve (Hao et al.
2023)."""


def stages_of(model: nn.Module, image: Tensor, paths: Sequence[str] = ()) -> dict[str, Shape]:
    """Path and output shape (without the batch) of a model's stages for pictures like `image`, shallow to deep: maps
    (channels, height, width) or tokens (tokens, width).

    `paths` names them; otherwise at most four are found. In a transformer or mixer they are blocks of its column, the
    last of each resolution or spaced as in `SPACED`; in a convolutional network the stages, or else the last module of
    each resolution above 1 x 1 (of square pictures square ones only). The model is left as it was. Raises
    UnknownNameError for a path it does not have, RoleError for one that gives neither maps nor tokens.
    """
    called = _outputs(model, image[:2], paths)
    if paths:
        for path in paths:
            require(path in called and len(called[path]) >= 2, f"'{path}' gives no maps and no tokens "
                    f"({called.get(path, 'no tensor')})", RoleError)
        return {path: called[path] for path in paths}
    return _column(model, called) or _resolutions(called)


def _outputs(model: nn.Module, image: Tensor, paths: Sequence[str]) -> dict[str, Shape]:
    """Shapes of what the modules return, in the order in which they return; those called more than once are left out,
    unless they are asked for."""
    names = list(paths) or [name for name, _ in model.named_modules() if name]
    count = dict.fromkeys(names, 0)
    order: list[str] = []

    def counter(name: str) -> Any:
        def count_call(module: nn.Module, inputs: Any, output: Any) -> None:
            count[name] += 1
            order.append(name)

        return count_call

    modes = [(m, m.training) for m in model.modules()]
    handles = []
    try:
        with torch.no_grad(), taps(model, names) as features:
            handles = [model.get_submodule(name).register_forward_hook(counter(name)) for name in names]
            model.eval()(image)
        once = [n for n in order if n in features and (paths or count[n] == 1)]
        found = {n: tuple(features[n].shape[1:]) for n in dict.fromkeys(once) if len(features[n]) == len(image)}
        square = not paths and image.shape[2] == image.shape[3]
        return {n: s for n, s in found.items() if not (square and len(s) == 3 and s[1] != s[2])}
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


def _column(model: nn.Module, called: dict[str, Shape]) -> dict[str, Shape]:
    """Stages among the blocks of the outermost list of blocks of one class that all return tokens, or all maps."""
    for name, container in model.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential) or len(container) < 2:
            continue
        blocks = [f"{name}.{child}" if name else child for child, _ in container.named_children()]
        one_kind = len({type(block) for block in container}) == 1
        composite = all(len(list(block.modules())) > 3 for block in container)
        forms = {len(called.get(b, ())) for b in blocks}
        if not (one_kind and composite and forms in ({2}, {3})):
            continue
        last = {called[b][:1] if len(called[b]) == 2 else called[b][1:]: b for b in blocks}
        if forms == {3} and _others(called, called[blocks[-1]], len(last) == 1):
            continue  # one stage of several, each a list of blocks
        if len(last) > 1:
            return {b: called[b] for b in list(last.values())[-MOST:]}
        if len(blocks) <= MOST:
            return {b: called[b] for b in blocks}
        return {blocks[i]: called[blocks[i]] for i in sorted({max(0, round(s * len(blocks)) - 1) for s in SPACED})}
    return {}


def _others(called: dict[str, Shape], end: Shape, higher: bool) -> bool:
    """Whether modules return maps of a resolution, above 1 x 1, that is lower than that of `end`, or also `higher`."""
    places = {shape[1] * shape[2] for shape in called.values() if len(shape) == 3} - {1}
    own = end[1] * end[2]
    return any(n < own or (higher and n > own) for n in places)


def _resolutions(called: dict[str, Shape]) -> dict[str, Shape]:
    """The last module of each resolution: the end of a stage rather than the inside of the block that leaves it."""
    inside: dict[Shape, dict[str, int]] = {}
    for path, shape in called.items():
        if len(shape) == 3 and shape[1] * shape[2] > 1:
            above = [called.get(path.rsplit(".", i)[0], ()) for i in range(1, path.count(".") + 1)]
            others = sum(len(a) == 3 and a[1:] != shape[1:] for a in above)
            inside.setdefault(shape[1:], {})[path] = others
    last = [[path for path, others in found.items() if others <= min(found.values()) + 1][-1]
            for found in inside.values()]
    return {path: called[path] for path in sorted(last, key=list(called).index)[-MOST:]}


def grid_of(tokens: int) -> tuple[int, int]:
    """Side of the largest square grid that `tokens` fill, and the number of (class) tokens before it."""
    side = int(tokens**0.5 + 1e-9)
    require(side >= 1, f"{tokens} tokens form no grid", DataError)
    return side, tokens - side * side


def feature_map(x: Float[Tensor, "n ..."]) -> Float[Tensor, "n channels height width"]:
    """Maps as they are; tokens [n, tokens, d] as a square map [n, d, side, side] without the prefix (class) tokens."""
    if x.dim() == 4:
        return x
    require(x.dim() == 3, f"features are maps [n, c, h, w] or tokens [n, tokens, d], not {tuple(x.shape)}", DataError)
    side, prefix = grid_of(x.shape[1])
    return x[:, prefix:].transpose(1, 2).unflatten(2, (side, side))


def pooled(x: Float[Tensor, "n ..."]) -> Float[Tensor, "n features"]:
    """One vector per sample of maps [n, c, h, w], tokens [n, tokens, d] or rows [n, d]: the mean over the places."""
    return x.mean((2, 3)) if x.dim() == 4 else x.mean(1) if x.dim() == 3 else x.flatten(1)
