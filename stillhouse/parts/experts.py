"""Several experts in one classifier: a shared trunk, and copies of its last stage and head side by side.

Any classifier can be branched. Behind the module at which it is split the batch is repeated once per expert, and every
module that works behind it becomes a row of copies, each of which sees its own part of that batch; what a model does
between its modules (pooling, residual sums) stays as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import DamagedFileError, RoleError, StoreError, UnknownNameError, require
from stillhouse.parts.stages import stages_of
from stillhouse.store import load_tree, save_tree

FILE = "experts.safetensors"
WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Branching:
    """Where a classifier is split: the last module of the trunk, those behind it that are copied, and the last linear
    layer ("" where there is none)."""

    split: str
    copied: tuple[str, ...]
    head: str


class CosineLinear(nn.Module):
    """scale cos(x, w_c) for every class c: a linear layer of normalised features and weights, without bias."""

    def __init__(self, weight: nn.Parameter, scale: float = 30.0):
        super().__init__()
        self.weight, self.scale = weight, scale

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, math.sqrt(5))

    def forward(self, x: Float[Tensor, "... features"]) -> Float[Tensor, "... classes"]:
        return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class _InPlaceOf(nn.Module):
    """A module that stands in the place of another, whose attributes the model around it may read."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            first = next(iter(self.__dict__.get("_modules", {}).values()), None)
            if first is None or name.startswith("_"):
                raise
            return getattr(first[0] if isinstance(first, nn.ModuleList) else first, name)


class Repeated(_InPlaceOf):
    """The last module of the trunk, its outputs [n, ...] repeated to [experts * n, ...]."""

    def __init__(self, module: nn.Module, count: int):
        super().__init__()
        self.module, self.count = module, count

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        n = _rows((args, kwargs))
        return _each(self.module(*args, **kwargs), lambda t: torch.cat([t] * self.count) if _of(t, n) else t)


class Branches(_InPlaceOf):
    """Copies of one module; copy e works on rows e n to (e + 1) n of its inputs [experts * n, ...]."""

    def __init__(self, copies: Sequence[nn.Module]):
        super().__init__()
        self.copies = nn.ModuleList(copies)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows, count = _rows((args, kwargs)), len(self.copies)
        outs = []
        for e, module in enumerate(self.copies):
            def part(t: Tensor, e: int = e) -> Tensor:
                return t.unflatten(0, (count, -1))[e] if _of(t, rows) else t

            outs.append(module(*_each(args, part), **_each(kwargs, part)))
        return _joined(outs, rows // count)


class Experts(nn.Module):
    """A classifier with `count` experts. `logits` gives those of each expert, calling it their mean.

    The trunk and the first expert are the modules of `network` itself, which stays usable alone; the other experts are
    copies. `scale` above 0 makes every head a `CosineLinear` with the weights that it has.
    """

    def __init__(self, network: nn.Module, count: int, branching: Branching, scale: float = 0.0):
        super().__init__()
        require(count >= 1, f"there must be at least 1 expert, not {count}")
        self.count, self.branching, self.scale = count, branching, scale
        self._origin = (network,)
        new: dict[str, nn.Module] = {}
        if scale:
            linear = network.get_submodule(branching.head)
            assert isinstance(linear, nn.Linear) and isinstance(linear.weight, nn.Parameter)
            network = _with_modules(network, {branching.head: CosineLinear(linear.weight, scale)})
        for path in branching.copied:
            module = network.get_submodule(path)
            new[path] = Branches([module, *(copy.deepcopy(module) for _ in range(count - 1))])
        new[branching.split] = Repeated(network.get_submodule(branching.split), count)
        self.model = _with_modules(network, new)

    def logits(self, image: Float[Tensor, "n channels height width"]) -> Float[Tensor, "experts n classes"]:
        return self.model(image).unflatten(0, (self.count, -1))

    def forward(self, image: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n classes"]:
        return self.logits(image).mean(0)

    @property
    def network(self) -> nn.Module:
        """The classifier that was branched."""
        return self._origin[0]

    def spec(self) -> dict[str, Any]:
        """All but the network and the weights, for JSON."""
        return {"count": self.count, "scale": self.scale, "split": self.branching.split,
                "copied": list(self.branching.copied), "head": self.branching.head}

    @classmethod
    def from_spec(cls, network: nn.Module, spec: Mapping[str, Any]) -> Experts:
        """Experts branched from `network` as `spec` describes, with equal weights."""
        branching = Branching(str(spec["split"]), tuple(str(p) for p in spec["copied"]), str(spec["head"]))
        return cls(network, int(spec["count"]), branching, float(spec["scale"]))

    def save(self, folder: Path | str) -> Path:
        """Write weights and branching into `folder`; `Experts.load(folder, network)` reads them."""
        folder = Path(folder)
        save_tree(folder / WEIGHTS, dict(self.state_dict()))
        save_tree(folder / FILE, self.spec())
        return folder

    @classmethod
    def load(cls, folder: Path | str, network: nn.Module) -> Experts:
        """Read what `save` wrote, in eval mode; `network` is a classifier like the one that was branched.

        Raises StoreError where the folder holds none or the network does not fit, DamagedFileError for a broken file.
        """
        folder = Path(folder)
        weights, spec = load_tree(folder / WEIGHTS), load_tree(folder / FILE)
        try:
            experts = cls.from_spec(network, spec)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise DamagedFileError(f"{folder / FILE} does not describe experts ({error})") from error
        except AttributeError as error:
            raise StoreError(f"the network given is not like the one that was branched: {error}") from error
        try:
            experts.load_state_dict(weights)
        except RuntimeError as error:
            raise StoreError(f"the network given does not have the weights saved in {folder}: {error}") from error
        return experts.eval()


def branched(model: nn.Module, image: Tensor, count: int, split: str = "", scale: float = 0.0, fresh: bool = True
             ) -> Experts:
    """`count` experts on one trunk made of any classifier for pictures like `image`.

    They branch behind the module `split`; by default the last of the `stages_of` the model that has weights is copied,
    and what comes after it. `scale` above 0 puts a cosine classifier in the place of the last linear layer. With
    `fresh` all experts but the first draw new weights where their layers know how to; without it they start equal.

    The result is checked on `image`: equal experts must give what one gives. Raises RoleError where they do not or
    where the model has no two stages, UnknownNameError for a `split` that it does not have.
    """
    found = branching_of(model, image, split)
    require(bool(found.head) or not scale, f"{type(model).__name__} has no linear layer behind '{found.split}' that "
            "could become a cosine classifier; scale 0 keeps its head", RoleError)
    experts = Experts(model, count, found, scale)
    single = Experts(model, 1, found, scale)
    modes = [(m, m.training) for top in (experts, single) for m in top.modules()]
    try:
        with torch.no_grad():
            one = single.eval()(image[:2])
            same = torch.allclose(experts.eval().model(image[:2]), one.repeat(count, 1), rtol=1e-4, atol=1e-5)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise RoleError(f"{type(model).__name__} cannot be branched behind '{found.split}' ({error}); name another "
                        "module as split") from error
    finally:
        for module, training in modes:
            module.training = training
    require(same, f"branched behind '{found.split}', the experts of {type(model).__name__} do not give what it gives "
            "alone; name another module as split", RoleError)
    if fresh:
        for branches in (m for m in experts.modules() if isinstance(m, Branches)):
            for other in branches.copies[1:]:
                _reset(other)
    return experts


def branching_of(model: nn.Module, image: Tensor, split: str = "") -> Branching:
    """Where a classifier is branched for pictures like `image`; see `branched`."""
    spans = _spans(model, image)
    if split:
        return _behind(model, spans, split)
    stages = list(stages_of(model, image))
    require(len(stages) >= 2, f"{type(model).__name__} has {len(stages)} stage(s) on pictures of "
            f"{tuple(image.shape[1:])}, so it is not clear which part to share; name the last shared module as split",
            RoleError)
    for split in reversed(stages[:-1]):
        found = _behind(model, spans, split)
        if any(p.dim() > 1 for path in found.copied if path != found.head
               for p in model.get_submodule(path).parameters()):
            break
    return found


def _behind(model: nn.Module, spans: dict[str, list[tuple[int, int]]], split: str) -> Branching:
    """What works behind `split`."""
    modules = dict(model.named_modules())
    require(split in modules and split != "", f"the model has no module '{split}' to be split at", UnknownNameError)
    require(len(spans.get(split, ())) == 1, f"'{split}' is not called exactly once in a forward pass, so the model "
            "cannot be split there", RoleError)
    end = spans[split][0][1]
    behind = {name for name, calls in spans.items() if calls and all(start > end for start, _ in calls)}
    twice = [n for n, calls in spans.items() if n not in behind and any(start > end for start, _ in calls)
             and any(stop < end for _, stop in calls) and list(modules[n].parameters())]
    require(not twice, f"'{(twice or [''])[0]}' works both before and behind '{split}'; name another module as split",
            RoleError)
    highest = [n for n in behind if not any(n.startswith(f"{other}.") for other in behind)]
    copied = [n for n in highest if list(modules[n].parameters()) or list(modules[n].buffers())]
    require(bool(copied), f"nothing with weights works behind '{split}'", RoleError)
    linears = [n for n in behind if isinstance(modules[n], nn.Linear)]
    return Branching(split, tuple(sorted(copied, key=lambda n: spans[n][0])),
                     max(linears, key=lambda n: spans[n][-1], default=""))


def _spans(model: nn.Module, image: Tensor) -> dict[str, list[tuple[int, int]]]:
    """When each module begins and ends in a forward pass, once per call. The model is left as it was."""
    spans: dict[str, list[tuple[int, int]]] = {}
    clock, open_at = [0], dict[str, int]()
    modes = [(m, m.training) for m in model.modules()]
    handles: list[Any] = []

    def begun(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            clock[0] += 1
            open_at[name] = clock[0]

        return note

    def ended(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            clock[0] += 1
            spans.setdefault(name, []).append((open_at[name], clock[0]))

        return note

    try:
        for name, module in model.named_modules():
            if name:
                handles += [module.register_forward_pre_hook(begun(name)), module.register_forward_hook(ended(name))]
        with torch.no_grad():
            model.eval()(image[:2])
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return spans


def _with_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    """A model like `model` with other modules at some paths. Everything else is shared with it: only the containers
    above these paths are new objects, with the parameters of the old ones."""
    clone = copy.copy(model)
    for name, value in vars(model).items():
        if isinstance(value, dict) and name not in ("_parameters", "_buffers"):
            vars(clone)[name] = copy.copy(value)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, module in new.items():
        first, _, rest = path.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = module
        else:
            clone._modules[first] = module
    for first, inner in below.items():
        clone._modules[first] = _with_modules(model.get_submodule(first), inner)
    return clone


def _reset(module: nn.Module) -> None:
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()


def _of(t: Tensor, rows: int) -> bool:
    return t.dim() > 0 and t.shape[0] == rows


def _rows(given: Any) -> int:
    """Length of the first tensor in a tree."""
    found: list[int] = []

    def note(t: Tensor) -> Tensor:
        found.extend(t.shape[:1])
        return t

    _each(given, note)
    return found[0] if found else 0


def _each(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return type(tree)(**{k: _each(v, change) for k, v in tree.items()})
    if isinstance(tree, list | tuple):
        return type(tree)(_each(v, change) for v in tree)
    return tree


def _joined(outs: list[Any], rows: int) -> Any:
    """Trees of outputs [n, ...] of all copies as one tree of [experts * n, ...]."""
    first = outs[0]
    if isinstance(first, Tensor):
        return torch.cat(outs) if _of(first, rows) else first
    if isinstance(first, Mapping):
        return type(first)(**{k: _joined([o[k] for o in outs], rows) for k in first})
    if isinstance(first, list | tuple):
        return type(first)(_joined(list(parts), rows) for parts in zip(*outs, strict=True))
    return first
