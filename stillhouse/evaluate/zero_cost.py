"""Scores of an untrained network from one batch, without training: what other searches rank candidates by. Higher is
better for each. The network is left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import RoleError, require
from stillhouse.evaluate.cost import macs, parameters

Images = Float[Tensor, "n channels height width"]
Labels = Int[Tensor, " n"]


@contextlib.contextmanager
def _gradients(model: nn.Module, train: bool = True) -> Iterator[list[nn.Parameter]]:
    """Inside, gradients may be computed; buffers, modes and gradients are as before after it."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    kept = [(p, p.grad) for p in model.parameters()]
    try:
        model.train(train)
        yield [p for p, _ in kept if p.requires_grad]
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for p, grad in kept:
            p.grad = grad


def gradient_norm(model: nn.Module, image: Images, label: Labels) -> float:
    """|| d CE / d theta ||."""
    with _gradients(model) as ps:
        grads = torch.autograd.grad(F.cross_entropy(model(image), label), ps, allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None]).norm().item()


def snip(model: nn.Module, image: Images, label: Labels) -> float:
    """sum | theta d CE / d theta | over the weights of convolutions and linear layers (Lee et al. 2019)."""
    with _gradients(model):
        ps = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        grads = torch.autograd.grad(F.cross_entropy(model(image), label), ps)
    return sum((p * g).abs().sum().item() for p, g in zip(ps, grads, strict=True))


def synflow(model: nn.Module, image: Images, label: Labels | None = None) -> float:
    """log of sum (theta d R / d theta), with R the sum of the outputs for a picture of ones, all weights replaced by
    their absolute values (Tanaka et al. 2020); BatchNorm, in eval mode and untrained, changes nothing. In float64."""
    with _gradients(model, train=False) as ps:
        kind = image.dtype
        signs = {p: p.detach().sign() for p in model.parameters()}
        try:
            with torch.no_grad():
                for p in model.parameters():
                    p.abs_()
            model.double()
            ones = torch.ones(1, *image.shape[1:], dtype=torch.double, device=image.device)
            grads = torch.autograd.grad(model(ones).sum(), ps, allow_unused=True)
            total = sum((p * g).sum() for p, g in zip(ps, grads, strict=True) if g is not None)
        finally:
            model.to(kind)
            with torch.no_grad():
                for p, sign in signs.items():
                    p.mul_(sign)
    return float(torch.as_tensor(total).detach().log())


def nwot(model: nn.Module, image: Images, label: Labels | None = None) -> float:
    """log |det K_H| of the Hamming similarities of the samples' ReLU patterns (Mellor et al. 2021). Raises RoleError
    for a network without nn.ReLU."""
    relus = [m for m in model.modules() if isinstance(m, nn.ReLU)]
    require(bool(relus), f"nwot reads nn.ReLU modules, and {type(model).__name__} has none", RoleError)
    codes: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda module, x, y: codes.append((y > 0).flatten(1).double())) for m in relus]
    try:
        with _gradients(model), torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.linalg.slogdet(torch.stack([c @ c.T + (1 - c) @ (1 - c).T for c in codes]).sum(0))[1].item()


PROXIES: dict[str, Callable[[nn.Module, Tensor, Tensor], float]] = {
    "parameters": lambda model, image, label: float(parameters(model)),
    "macs": lambda model, image, label: float(macs(model, image[:1])),
    "gradient norm": gradient_norm, "snip": snip, "synflow": synflow, "nwot": nwot,
}
"""Scores by name."""
