"""Low-rank adapters (LoRA) on a network's own layers, switched on where they are wanted and taken off at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from stillhouse.errors import MissingExtraError, RoleError, require

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class LoRA(nn.Module):
    """W + (alpha / rank) B A on the linear and convolution layers of `network`, by `peft` (Hu et al. 2021).

    `targets` are the ends of the layers' paths; () means the attention projections where the network names them as
    `diffusers` does, else every linear layer. The adapters begin as the zero map and are off: `with lora.on():` lets
    them act, for forward passes whose backward may follow later. Its parameters and `state_dict` are the adapters
    alone. `remove` gives the network back as it was: the same layers, hooks, modes and `requires_grad`.

    Raises MissingExtraError without `peft`, RoleError where no layer matches.
    """

    def __init__(self, network: nn.Module, rank: int = 4, alpha: float | None = None, targets: Sequence[str] = ()):
        super().__init__()
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError as error:
            raise MissingExtraError("LoRA needs peft; install it with: pip install 'stillhouse[hf]'") from error
        require(rank >= 1, f"the rank of an adapter is 1 or more, not {rank}")
        names = _matching(network, targets)
        flags = [(p, p.requires_grad) for p in network.parameters()]
        modes = {name: module.training for name, module in network.named_modules()}
        config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=names)  # type: ignore[arg-type]
        inject_adapter_in_model(config, network)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for name, module in network.named_modules():
            module.training = modes.get(name, False)
        self._network = [network]
        self._layers: dict[str, Any] = {n: m for n, m in network.named_modules() if isinstance(m, BaseTunerLayer)}
        self.adapters = nn.ModuleList(nn.ModuleList((layer.lora_A["default"], layer.lora_B["default"]))
                                      for layer in self._layers.values())
        self._switch(False)

    def _switch(self, on: bool) -> None:
        for layer in self._layers.values():
            layer._disable_adapters = not on

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Let the adapters act in forward passes of the network."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def remove(self) -> None:
        """Put the network's own layers back in place."""
        (network,) = self._network
        for name, layer in self._layers.items():
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
        self._layers = {}
        if hasattr(network, "peft_config"):
            del network.peft_config


@contextlib.contextmanager
def adapted(network: nn.Module, rank: int = 4, alpha: float | None = None, targets: Sequence[str] = ()
            ) -> Iterator[LoRA]:
    """A `LoRA` on `network` that is removed at the end, on exceptions too."""
    lora = LoRA(network, rank, alpha, targets)
    try:
        yield lora
    finally:
        lora.remove()


def _matching(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """The full paths of the layers that get adapters."""
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}

    def ending(ends: Sequence[str]) -> list[str]:
        return [n for n in layers if any(n == end or n.endswith("." + end) for end in ends)]

    found = ending(targets) if targets else ending(ATTENTION) or [
        n for n, m in layers.items() if isinstance(m, nn.Linear)]
    require(bool(found), f"{type(network).__name__} has no linear layer {' or '.join(targets)} for adapters; it has "
            f"{', '.join(list(layers)[:6]) or 'none'}", RoleError)
    return found
