"""Residual networks without their shortcuts: every block relu(F(x) + shortcut(x)) becomes relu(F(x))."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.errors import DamagedFileError, RoleError, StoreError, require
from stillhouse.store import load_tree, save_tree, write_text

PLAIN = "plain.json"
"""The file that says which blocks of a saved network have no shortcut."""

Way = tuple[tuple[str, ...], str, str]
WAYS: tuple[Way, ...] = (
    (("first", "second"), "", "skip"),
    (("layer",), "activation", "shortcut"),
    (("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3"), "relu", "downsample"),
    (("conv1", "bn1", "relu", "conv2", "bn2"), "relu", "downsample"),
    (("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "act2", "conv3", "bn3", "se", "drop_path"), "act3",
     "downsample"),
    (("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "se", "drop_path"), "act2", "downsample"),
)
"""Forms of a residual block by the names of its parts: the way through F, the activation after the sum ("" is a ReLU
that is not a module), the shortcut. They are those of stillhouse, of transformers, and of the two blocks each of
torchvision and timm. A part that a block has as None is passed over."""
OPTIONAL = ("drop_block", "aa", "se", "drop_path", "downsample")


class Block(nn.Module):
    """One residual block on the parts of another, under the same names, with a shortcut or without.

    `shortcut` is None (plain) or a module that is added to F(x); `identity` says whether the block's own was the
    identity, without weights.
    """

    def __init__(self, block: nn.Module, way: Way, shortcut: nn.Module | None = None):
        super().__init__()
        self.way, self.last = [name for name in way[0] if getattr(block, name, None) is not None], way[1]
        own = getattr(block, way[2], None)
        self.identity = own is None or isinstance(own, nn.Identity)
        self.training = block.training
        for name, part in block.named_children():
            if name != way[2]:
                self.add_module(name, part)
        self.shortcut = shortcut

    def residual(self, x: Tensor) -> Tensor:
        """F(x)."""
        for name in self.way:
            x = self.get_submodule(name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return self.get_submodule(self.last)(out) if self.last else F.relu(out)


def way_of(block: nn.Module) -> Way | None:
    """The form of a residual block, or None for a module that is none of those that are known."""
    names = set(dict(block.named_children())) | {n for n in OPTIONAL if hasattr(block, n)}
    return next((way for way in WAYS if {*way[0], *filter(None, way[1:])} <= names), None)


def residual_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The residual blocks of a model by module path, shallow to deep, those within a removed one included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Block) or way_of(m) is not None}


def remove_shortcuts(model: nn.Module) -> list[str]:
    """Replace every residual block by its plain form, in place; the paths of those blocks are returned.

    Weights stay where they are and keep their names; projections on shortcuts are dropped. Raises RoleError where no
    block of a known form is found.
    """
    found = residual_blocks(model)
    require(bool(found), f"{type(model).__name__} has no residual block of a known form; known are those of "
            "stillhouse's SmallResNet, of transformers' ResNet, and BasicBlock and Bottleneck of torchvision and timm",
            RoleError)
    removed = [name for name, block in found.items() if not isinstance(block, Block) or block.shortcut is not None]
    for name in removed:
        block, way = found[name], way_of(found[name])
        if isinstance(block, Block):
            block.shortcut = None
        elif way is not None:
            _put(model, name, Block(block, way))
    return removed


def without_shortcuts(model: nn.Module) -> nn.Module:
    """The plain twin of a residual network: a copy of it, with the same weights, without its shortcuts."""
    plain = copy.deepcopy(model)
    remove_shortcuts(plain)
    return plain


def with_shortcuts(model: nn.Module) -> nn.Module:
    """A copy of a residual network that computes the same, its blocks opened up: each a `Block` with its own shortcut.
    Of a plain twin, a copy with identities back where they were; dropped projections stay away."""
    opened = copy.deepcopy(model)
    for name, block in residual_blocks(opened).items():
        if isinstance(block, Block):
            block.shortcut = nn.Identity() if block.identity and block.shortcut is None else block.shortcut
            continue
        way = way_of(block)
        assert way is not None
        own = getattr(block, way[2], None)
        _put(opened, name, Block(block, way, nn.Identity() if own is None else own))
    return opened


class PlainNetwork(nn.Module):
    """A network with the names of those of its `blocks` that have no shortcut, so that it can be saved and read."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]):
        super().__init__()
        self.model, self.blocks = model, list(blocks)

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)

    def save(self, folder: Path | str) -> Path:
        """Write the weights as model.safetensors and the names of the plain blocks as plain.json."""
        folder = Path(folder)
        save_tree(folder / "model.safetensors", dict(self.model.state_dict()))
        write_text(folder / PLAIN, json.dumps({"blocks": self.blocks}, indent=1))
        return folder

    @classmethod
    def load(cls, folder: Path | str, network: nn.Module) -> PlainNetwork:
        """Read what `save` wrote, in eval mode, into a residual `network` like the one that it came from.

        Raises StoreError where the network has other blocks or weights, DamagedFileError for a broken plain.json.
        """
        folder = Path(folder)
        try:
            blocks = [str(name) for name in json.loads((folder / PLAIN).read_text(encoding="utf-8"))["blocks"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(f"{folder / PLAIN} does not hold the names of blocks ({error})") from error
        if blocks:
            there = remove_shortcuts(network)
            require(there == blocks, f"{folder} was saved from a network whose residual blocks are "
                    f"{', '.join(blocks)}; the one given has {', '.join(there)}", StoreError)
        try:
            network.load_state_dict(load_tree(folder / "model.safetensors"))
        except RuntimeError as error:
            raise StoreError(f"the network given does not have the weights saved in {folder}: {error}") from error
        return cls(network, blocks).eval()


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    above, _, name = path.rpartition(".")
    setattr(model.get_submodule(above), name, module)
