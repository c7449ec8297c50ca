"""The score of what is being made: a trainable denoiser that also sees the camera."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import RoleError, require
from stillhouse.parts.lora import LoRA

TIME_MODULES = ("time_embedding", "time_embed", "embed")


class CameraEmbedding(nn.Module):
    """The 16 numbers of a 4 x 4 extrinsic through a small MLP; the last layer begins at zero, so it begins silent."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, extrinsic: Float[Tensor, "batch 4 4"]) -> Float[Tensor, "batch width"]:
        return self.layers(extrinsic.flatten(1))


class FakeScore(nn.Module):
    """A Denoiser called as fake(x_t, t, condition, extrinsic), returning x0.

    With `lora` it is the teacher with adapters: `denoiser` is then borrowed, not owned, and only the adapters and the
    camera embedding are parameters. The camera embedding is added to the output of the module that embeds the time,
    found by its usual names or given as the path `time`; all-zero extrinsics stand for "no camera" and add nothing that
    depends on one. Without `cameras` there is none.

    Raises RoleError where the denoiser has no module that embeds the time.
    """

    def __init__(self, denoiser: Any, lora: LoRA | None = None, cameras: bool = True, time: str | None = None):
        super().__init__()
        self.lora = lora
        self._borrowed = [denoiser] if lora is not None else []
        self.denoiser = None if lora is not None else denoiser
        self.process = denoiser.process
        self.parameterisation = getattr(denoiser, "parameterisation", "eps")
        self.time = _time_module(denoiser, time) if cameras else ""
        self.camera = CameraEmbedding(_width(denoiser.get_submodule(self.time))) if cameras else None

    def forward(
        self, x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], condition: Tensor | None = None,
        extrinsic: Float[Tensor, "batch 4 4"] | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """The estimate of x0."""
        denoiser: Any = self._borrowed[0] if self._borrowed else self.denoiser
        with contextlib.ExitStack() as stack:
            if self.lora is not None:
                stack.enter_context(self.lora.on())
            if self.camera is not None and extrinsic is not None:
                stack.enter_context(added(denoiser.get_submodule(self.time), self.camera(extrinsic)))
            return denoiser(x_t, t, condition)


class SeparateScores(nn.Module):
    """One copy of `fake` per particle: sample i is read by the copy of its particle. Nothing is shared.

    All copies begin alike. Called as scores(x_t, t, condition, extrinsic, particle).
    """

    def __init__(self, fake: FakeScore, count: int):
        super().__init__()
        require(fake.lora is None, "a fake score per particle needs networks of their own, not adapters on one network")
        self._fake = [fake]
        self.process, self.parameterisation = fake.process, fake.parameterisation
        self.names = [name for name, _ in fake.named_parameters()]
        self.copies = nn.ParameterList(nn.Parameter(p.detach().expand(count, *p.shape).clone())
                                       for p in fake.parameters())

    def forward(
        self, x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], condition: Tensor | None,
        extrinsic: Float[Tensor, "batch 4 4"] | None, particle: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch ..."]:
        """The estimates of x0."""
        own = {name: p[particle] for name, p in zip(self.names, self.copies, strict=True)}

        def one(weights: Any, *given: Any) -> Tensor:
            alone = tuple(None if v is None else v[None] for v in given)
            return torch.func.functional_call(self._fake[0], weights, alone)[0]

        given = (x_t, t, condition, extrinsic)
        return torch.vmap(one, in_dims=(0, *(None if v is None else 0 for v in given)))(own, *given)


@contextlib.contextmanager
def added(module: nn.Module, value: Float[Tensor, "batch width"]) -> Iterator[None]:
    """Add `value` to what `module` returns."""
    handle = module.register_forward_hook(lambda module, inputs, output: output + value.to(output.dtype))
    try:
        yield
    finally:
        handle.remove()


def _time_module(denoiser: nn.Module, path: str | None) -> str:
    names = [n for n, _ in denoiser.named_modules()]
    found = [n for end in ((path,) if path else TIME_MODULES) for n in names if n == end or n.endswith(f".{end}")]
    require(bool(found), f"{type(denoiser).__name__} has no module {path or ' or '.join(TIME_MODULES)} to which the "
            "camera could be added; name the module that embeds the time", RoleError)
    return found[0]


def _width(module: nn.Module) -> int:
    widths = [m.out_features for m in module.modules() if isinstance(m, nn.Linear)]
    require(bool(widths), f"{type(module).__name__} has no linear layer that says how wide the time embedding is",
            RoleError)
    return widths[-1]
