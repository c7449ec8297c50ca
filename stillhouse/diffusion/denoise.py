"""Any network of a stated parameterisation, on a stated process, as a Denoiser that returns x0."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.diffusion.convert import PARAMETERISATIONS, Parameterisation, boundary_scales, input_scale, to_x0
from stillhouse.diffusion.process import Process, expand, process_of
from stillhouse.errors import RoleError, require


class NetworkDenoiser(nn.Module):
    """`network(x_t, t, condition)` of kind `parameterisation`, read as the estimate of x0.

    `sigma_data` is the standard deviation of the data; with `scale_input` the network sees x_t at unit variance
    (EDM's c_in; on a VP process with sigma_data = 1 it changes nothing). `bottleneck` is the path of the inner
    module whose output `features` returns; it defaults to the network's own attribute `bottleneck` or `mid_block`.
    With `boundary` the estimate is that of a consistency model: at t = 0 it is x_t itself, whatever the weights.
    `null_condition` is one condition without a batch axis. Accepted times are [0, 1], for eps and v with sigma_t > 0.
    """

    null_condition: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        parameterisation: Parameterisation = "v",
        sigma_data: float = 1.0,
        scale_input: bool = True,
        null_condition: Tensor | None = None,
        bottleneck: str | None = None,
        boundary: bool = False,
    ):
        super().__init__()
        require(parameterisation in PARAMETERISATIONS, f"unknown parameterisation {parameterisation!r}; known are "
                f"{', '.join(PARAMETERISATIONS)}")
        require(sigma_data > 0, f"sigma_data must be positive, got {sigma_data}")
        self.network = network
        self.process = process
        self.parameterisation: Parameterisation = parameterisation
        self.sigma_data = sigma_data
        self.scale_input = scale_input
        self.bottleneck = bottleneck
        self.boundary = boundary
        self.register_buffer("null_condition", null_condition, persistent=False)

    def output(
        self, x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], condition: Tensor | None = None
    ) -> Float[Tensor, "batch ..."]:
        """What the network itself predicts."""
        if self.scale_input:
            x_t = expand(input_scale(self.process.alpha(t), self.process.sigma(t), self.sigma_data), x_t) * x_t
        return self.network(x_t, t, condition)

    def forward(
        self, x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], condition: Tensor | None = None
    ) -> Float[Tensor, "batch ..."]:
        """The estimate of x0."""
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        output = self.output(x_t, t, condition)
        if not self.boundary:
            return to_x0(self.parameterisation, output, x_t, alpha, sigma, self.sigma_data)
        if self.parameterisation not in ("edm", "trigflow"):
            output = to_x0(self.parameterisation, output, x_t, alpha, sigma, self.sigma_data)
        c_skip, c_out = boundary_scales(self.process, t, self.sigma_data, self.parameterisation)
        return expand(c_skip, x_t) * x_t + expand(c_out, x_t) * output

    def features(
        self, x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], condition: Tensor | None = None
    ) -> Float[Tensor, "batch ..."]:
        """The output of the bottleneck, with gradient; the layers behind it are not run."""
        handle = self.inner().register_forward_hook(_stop)
        try:
            self.output(x_t, t, condition)
        except _Reached as reached:
            return reached.features
        finally:
            handle.remove()
        raise RoleError(f"the bottleneck of {type(self.network).__name__} was never run in a forward pass")

    def inner(self) -> nn.Module:
        """The bottleneck module. Raises RoleError where the network has none and none was named."""
        for name in (self.bottleneck,) if self.bottleneck else ("bottleneck", "mid_block"):
            try:
                return self.network.get_submodule(name)
            except AttributeError:
                continue
        raise RoleError(f"{type(self.network).__name__} has no module {self.bottleneck or 'bottleneck or mid_block'}; "
                        "name the path of an inner module, e.g. NetworkDenoiser(..., bottleneck='layers.3')")

    def spec(self) -> dict[str, Any]:
        """Everything but the weights, as numbers, strings and lists."""
        null = self.null_condition
        boundary = {"boundary": True} if self.boundary else {}
        return {
            **boundary,
            "process": self.process.spec(),
            "parameterisation": self.parameterisation,
            "sigma_data": self.sigma_data,
            "scale_input": self.scale_input,
            "bottleneck": self.bottleneck,
            "null_condition": None if null is None else null.tolist(),
        }

    @classmethod
    def from_spec(cls, network: nn.Module, spec: dict[str, Any]) -> NetworkDenoiser:
        """The denoiser that `spec` describes, around `network`."""
        options = dict(spec)
        null = options.pop("null_condition")
        return cls(network, process_of(options.pop("process")), **options,
                   null_condition=None if null is None else torch.tensor(null))


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the weights of `source`. Raises RoleError, before anything is changed, where they do not fit."""
    ours, theirs = target.state_dict(), source.state_dict()
    different = ours.keys() ^ theirs.keys()
    different |= {name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape}
    if different or not ours:
        raise RoleError(f"the weights of {type(source).__name__} do not fit {type(target).__name__}: "
                        f"{len(different)} tensors differ, first '{min(different, default='')}'")
    target.load_state_dict(theirs)


class _Reached(Exception):
    def __init__(self, features: Tensor):
        self.features = features


def _stop(module: nn.Module, inputs: Any, output: Any) -> None:
    raise _Reached(output[0] if isinstance(output, tuple) else output)
