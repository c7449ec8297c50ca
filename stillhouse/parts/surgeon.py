"""Structured pruning of the speech encoders of `transformers`: HubertModel, Wav2Vec2Model, WavLMModel.

Their structures are the channels of each convolution ("conv_0", …), the heads of each attention ("head_0", …) and the
hidden units of each feed-forward block ("unit_0", …). A model can be gated (by hooks, without editing it), counted as
if only some structures were there, and cut: weights are removed physically and each layer keeps its own width.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import RoleError, require
from stillhouse.parts.taps import taps
from stillhouse.store import save_tree, write_text

UNITS = ("conv", "head", "unit")
FILE = "pruned.json"
FRONT = "feature_projection"


@dataclass(frozen=True)
class Layout:
    """The widths of a speech encoder: what its parameters are counted from.

    `convs` are (channels, kernel, biased, normed) of each convolution, `width` is d, `rest` what cannot be pruned.
    `per_head` are parameters that each head has beside its projections.
    """

    convs: tuple[tuple[int, int, bool, bool], ...]
    width: int
    projection_normed: bool
    heads: tuple[int, ...]
    head_width: int
    per_head: int
    units: tuple[int, ...]
    rest: int = 0

    def sizes(self, kinds: Sequence[str] = UNITS) -> dict[str, int]:
        """Number of structures in every group of the `kinds`."""
        every = {"conv": [c[0] for c in self.convs], "head": self.heads, "unit": self.units}
        return {f"{kind}_{i}": n for kind in kinds for i, n in enumerate(every[kind])}

    def count(self, kept: Mapping[str, Any] | None = None) -> Any:
        """Number of parameters with `kept` structures in the groups named, all in the others; differentiable where
        these numbers are tensors.

        Conv l: c_{l-1} c_l k_l (+ c_l if biased, + 2 c_l if normed); projection: 2 c_L + (c_L + 1) d; attention:
        3 (d + 1) H d_h + (H d_h + 1) d; feed-forward: (d + 1) F + (F + 1) d; and the rest (Peng et al. 2023, section
        2.2). Convolutions multiply what is kept of their input and of their output.
        """
        kept, d = {**self.sizes(), **(kept or {})}, self.width
        total, before = self.rest, 1
        for i, (_, kernel, biased, normed) in enumerate(self.convs):
            c = kept[f"conv_{i}"]
            total = total + before * c * kernel + c * (biased + 2 * normed)
            before = c
        total = total + 2 * before * self.projection_normed + (before + 1) * d
        for i in range(len(self.heads)):
            H, units = kept[f"head_{i}"], kept[f"unit_{i}"]
            wide = H * self.head_width
            total = total + 3 * (d + 1) * wide + (wide + 1) * d + H * self.per_head
            total = total + (d + 1) * units + (units + 1) * d
        return total


def layout(model: Any) -> Layout:
    """The widths of a HubertModel, Wav2Vec2Model or WavLMModel, cut or not. Raises RoleError for another model."""
    convs, layers = _parts(model)
    first = layers[0].attention
    found = Layout(
        tuple((c.conv.out_channels, c.conv.kernel_size[0], c.conv.bias is not None, hasattr(c, "layer_norm"))
              for c in convs),
        model.feature_projection.projection.out_features,
        hasattr(model.feature_projection, "layer_norm"),
        tuple(layer.attention.num_heads for layer in layers),
        first.head_dim,
        int(hasattr(first, "gru_rel_pos_const")),
        tuple(layer.feed_forward.intermediate_dense.out_features for layer in layers))
    total = sum(p.numel() for p in model.parameters())
    return Layout(**{**vars(found), "rest": total - found.count()})


def _parts(model: Any) -> tuple[Any, Any]:
    """Convolution and transformer layers."""
    convs = getattr(getattr(model, "feature_extractor", None), "conv_layers", None)
    layers = getattr(getattr(model, "encoder", None), "layers", None)
    if convs is None or layers is None or not hasattr(model, FRONT):
        inner = getattr(model, "base_model", model)
        hint = f" Give its base model ({type(inner).__name__})." if inner is not model else ""
        raise RoleError("pruning needs a HubertModel, Wav2Vec2Model or WavLMModel of transformers, not a "
                        f"{type(model).__name__}.{hint}")
    return convs, layers


# ---------------------------------------------------------------------------------- hidden states


def hidden_states(
    model: nn.Module, audio: Float[Tensor, "batch samples"], layers: Sequence[int]
) -> list[Float[Tensor, "batch frames width"]]:
    """The outputs of some layers: 0 is the projected output of the convolutions, before the positional convolution, i
    the output of the i-th transformer layer. Raises RoleError for a layer that the model does not have."""
    n = len(_parts(model)[1])
    bad = [i for i in layers if not 0 <= i <= n]
    require(not bad, f"the model has layers 0 to {n}, not {bad}", RoleError)
    paths = [FRONT if i == 0 else f"encoder.layers.{i - 1}" for i in layers]
    with taps(model, paths) as features:
        model(audio)
        return [features[path] for path in paths]


@contextlib.contextmanager
def unmasked(model: Any) -> Iterator[None]:
    """Without the random masks on time and features, and the skipped layers, of pre-training; dropout stays."""
    fields = {"apply_spec_augment": False, "layerdrop": 0.0}
    saved = {name: getattr(model.config, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(model.config, name, value)
        yield
    finally:
        for name, value in saved.items():
            setattr(model.config, name, value)


# ---------------------------------------------------------------------------------- gates


@contextlib.contextmanager
def gated(model: nn.Module, gates: Any) -> Iterator[None]:
    """Multiply the structures of `model` by `gates[name]` in every forward pass, for the groups that `gates` contains.

    Channels after their convolution's norm and activation, heads before the output projection, units after the
    activation. The hooks are removed at the end, on exceptions too. (The attention of WavLM, which computes all in one
    function, is replaced in between by `RelativeAttention` on the same parameters.)
    """
    convs, layers = _parts(model)
    handles: list[Any] = []
    swapped: list[tuple[Any, nn.Module]] = []
    try:
        for i, conv in enumerate(convs):
            if f"conv_{i}" in gates:
                handles.append(conv.register_forward_hook(_scale_channels(gates, f"conv_{i}")))
        for i, layer in enumerate(layers):
            if f"head_{i}" in gates:
                if hasattr(layer.attention, "gru_rel_pos_linear"):
                    swapped.append((layer, layer.attention))
                    layer.attention = RelativeAttention(layer.attention)
                handles.append(layer.attention.out_proj.register_forward_pre_hook(
                    _scale_inputs(gates, f"head_{i}", layer.attention.head_dim)))
            if f"unit_{i}" in gates:
                handles.append(layer.feed_forward.output_dense.register_forward_pre_hook(
                    _scale_inputs(gates, f"unit_{i}", 1)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, attention in swapped:
            layer.attention = attention


def _scale_channels(gates: Any, name: str) -> Any:
    return lambda module, inputs, output: output * gates[name][:, None]


def _scale_inputs(gates: Any, name: str, repeats: int) -> Any:
    return lambda module, inputs: (inputs[0] * gates[name].repeat_interleave(repeats),)


class RelativeAttention(nn.Module):
    """The attention of WavLM with gated relative positions, on the same parameters, for any subset of its heads.

    The position bias is made by the first layer for all heads, of which every layer takes its own.
    """

    heads: Tensor
    gru_rel_pos_const: Tensor
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    gru_rel_pos_linear: nn.Module
    rel_attn_embed: nn.Module

    def __init__(self, attention: Any):
        super().__init__()
        self.total_heads, self.num_heads, self.head_dim = attention.num_heads, attention.num_heads, attention.head_dim
        self.num_buckets, self.max_distance = attention.num_buckets, attention.max_distance
        self.dropout = attention.dropout
        for name, module in attention.named_children():
            self.add_module(name, module)
        self.gru_rel_pos_const = attention.gru_rel_pos_const
        self.register_buffer("heads", torch.arange(self.num_heads, device=self.gru_rel_pos_const.device),
                             persistent=False)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None,
        index: int = 0, **kwargs: Any,
    ) -> tuple[Tensor, None, Tensor]:
        batch, length, _ = hidden_states.shape
        if position_bias is None:
            position_bias = self.compute_bias(length).repeat(batch, 1, 1)
        out = hidden_states.new_zeros(batch, length, 0)
        if self.num_heads:
            split = (batch, length, self.num_heads, self.head_dim)
            q, k, v = (f(hidden_states).view(split).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
            bias = self._gate(hidden_states) * position_bias.view(batch, -1, length, length)[:, self.heads]
            if attention_mask is not None:
                bias = bias.masked_fill(attention_mask.ne(1)[:, None, None], -torch.inf)
            out = F.scaled_dot_product_attention(q, k, v, bias, self.dropout if self.training else 0.0)
            out = out.transpose(1, 2).flatten(2)
        return self.out_proj(out), None, position_bias

    def _gate(self, hidden_states: Tensor) -> Float[Tensor, "batch heads length one"]:
        """How much the content of each position lets the position bias through (Chen et al. 2022, section 2.2)."""
        own = hidden_states.unflatten(-1, (self.total_heads, -1))[:, :, self.heads].transpose(1, 2)
        a, b = torch.sigmoid(self.gru_rel_pos_linear(own).unflatten(-1, (2, 4)).sum(-1)).chunk(2, -1)
        return a * (b * self.gru_rel_pos_const - 1) + 2

    def compute_bias(self, length: int) -> Float[Tensor, "heads length length"]:
        """One learned number for each head and bucket of distances (Raffel et al. 2020, section 2.1)."""
        place = torch.arange(length, device=self.heads.device)
        distance = place[None, :] - place[:, None]
        half = self.num_buckets // 2
        exact = half // 2
        far = distance.abs().clamp_min(1).float()
        far = exact + (torch.log(far / exact) / math.log(self.max_distance / exact) * (half - exact)).long()
        bucket = torch.where(distance.abs() < exact, distance.abs(), far.clamp_max(half - 1))
        return self.rel_attn_embed(bucket + half * (distance > 0)).permute(2, 0, 1)


# ---------------------------------------------------------------------------------- the cut


class KeptNorm(nn.Module):
    """The LayerNorm over the last convolution's channels after a cut, with the statistics of the gated model.

    Each kept channel is multiplied by its gate; the removed ones count as zeros in mean and variance. As the norm moves
    those zeros to -mean / std, that number follows the kept channels as one more, for `KeptProjection`.
    """

    gate: Tensor

    def __init__(self, norm: nn.LayerNorm, keep: Tensor, gate: Tensor):
        super().__init__()
        self.total, self.eps = norm.normalized_shape[0], norm.eps
        self.weight, self.bias = _chosen(norm.weight, keep), _chosen(norm.bias, keep)
        self.register_buffer("gate", gate.clone())

    def forward(self, x: Float[Tensor, "... kept"]) -> Float[Tensor, "... kept_and_one"]:
        x = x * self.gate
        removed = self.total - x.shape[-1]
        mean = x.sum(-1, keepdim=True) / self.total
        variance = ((x - mean).square().sum(-1, keepdim=True) + removed * mean.square()) / self.total
        scale = torch.rsqrt(variance + self.eps)
        return torch.cat([(x - mean) * scale * self.weight + self.bias, -mean * scale], -1)


class KeptProjection(nn.Module):
    """The projection after a `KeptNorm`. `removed` (fixed, [width]) is what the removed channels add for each unit of
    -mean / std; their biases are in the bias."""

    removed: Tensor

    def __init__(self, projection: nn.Linear, norm: nn.LayerNorm, keep: Tensor, gone: Tensor):
        super().__init__()
        self.in_features, self.out_features = len(keep), projection.out_features
        lost = projection.weight.detach()[:, gone]
        self.weight = _chosen(projection.weight, keep, dim=1)
        self.bias = nn.Parameter(projection.bias.detach() + lost @ norm.bias.detach()[gone])
        self.register_buffer("removed", lost @ norm.weight.detach()[gone])

    def forward(self, x: Float[Tensor, "... kept_and_one"]) -> Float[Tensor, "... width"]:
        return F.linear(x[..., :-1], self.weight, self.bias) + x[..., -1:] * self.removed


class NoHeads(nn.Module):
    """What is left of an attention without heads: the bias of its output."""

    def __init__(self, attention: Any):
        super().__init__()
        self.num_heads, self.head_dim, self.out_proj = 0, attention.head_dim, attention.out_proj

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return self.out_proj(hidden_states[..., :0]), None


class Pruned:
    """What a cut model can do beside what its class offers: `save(folder)`, to be read by `hub.speech.load_pruned`.

    `kept` says which structures are left in the groups that were cut.
    """

    kept: dict[str, list[int]]

    def save(self, folder: Path | str) -> None:
        """Write the weights as model.safetensors, and configuration and widths as pruned.json."""
        model: Any = self
        save_tree(Path(folder) / "model.safetensors", dict(model.state_dict()))
        described = {"model": type(self).__mro__[2].__name__, "kept": self.kept,
                     "config": json.loads(model.config.to_json_string(use_diff=False))}
        write_text(Path(folder) / FILE, json.dumps(described, indent=1))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: no configuration of `transformers` describes a width of its own for each layer."""
        raise RoleError("no configuration of transformers describes a pruned model; use save(folder), and "
                        "stillhouse.hub.speech.load_pruned(folder) to read it")


@functools.cache
def _pruned(kind: type) -> type:
    return type(f"Pruned{kind.__name__}", (Pruned, kind), {})


@torch.no_grad()
def cut(model: Any, masks: Mapping[str, Float[Tensor, " n"]]) -> nn.Module:
    """Remove the structures whose mask is 0, in place, and fold the values of the others into the next linear map.

    The result gives what the gated model gives with these masks, with two exceptions: a norm over channels inside the
    convolutions (large models) then sees the kept channels alone. The values of the last convolution stay as fixed
    factors in front of its norm (`KeptNorm`). Of an attention or feed-forward block that loses everything its output
    bias is left. The model becomes a `Pruned` one of its class. Raises RoleError for masks that do not fit, one that
    removes every channel of a convolution, and a model that was cut before.
    """
    convs, layers = _parts(model)
    require(not isinstance(model, Pruned), "this model was cut before; cut the original, or prune further by gates on "
            "a copy of it", RoleError)
    sizes = layout(model).sizes()
    wrong = [f"{name} ({len(mask)} values for {sizes.get(name, 'no')} structures)" for name, mask in masks.items()
             if sizes.get(name) != len(mask)]
    require(not wrong, f"masks that do not fit the model: {', '.join(wrong)}", RoleError)
    empty = [name for name, mask in masks.items() if name.startswith("conv") and not mask.any()]
    require(not empty, f"a convolution must keep at least one channel; the mask of {', '.join(empty)} keeps none",
            RoleError)
    kept = {name: mask.nonzero().flatten() for name, mask in masks.items()}
    values = {name: mask[kept[name]] for name, mask in masks.items()}
    for i, conv in enumerate(convs):
        if f"conv_{i - 1}" in masks:
            conv.conv.weight = _chosen(conv.conv.weight * masks[f"conv_{i - 1}"][:, None], kept[f"conv_{i - 1}"], dim=1)
        if f"conv_{i}" in masks:
            _keep_channels(conv, kept[f"conv_{i}"])
        conv.conv.out_channels, conv.conv.in_channels = conv.conv.weight.shape[:2]
    last = f"conv_{len(convs) - 1}"
    if last in masks:
        _keep_projected(model.feature_projection, masks[last], kept[last])
    for i, layer in enumerate(layers):
        if f"head_{i}" in masks:
            _keep_heads(layer, kept[f"head_{i}"], values[f"head_{i}"])
        if f"unit_{i}" in masks:
            block, keep = layer.feed_forward, kept[f"unit_{i}"]
            _keep_outputs(block.intermediate_dense, keep)
            _keep_inputs(block.output_dense, keep, values[f"unit_{i}"])
    kind: Any = type(model)
    model.__class__ = _pruned(kind)
    model.kept = {name: keep.tolist() for name, keep in kept.items()}
    return model


def _chosen(value: Tensor, keep: Tensor, dim: int = 0) -> nn.Parameter:
    return nn.Parameter(value.detach().index_select(dim, keep).clone())


def _keep_outputs(linear: nn.Linear, keep: Tensor) -> None:
    linear.weight, linear.out_features = _chosen(linear.weight, keep), len(keep)
    if linear.bias is not None:
        linear.bias = _chosen(linear.bias, keep)


def _keep_inputs(linear: nn.Linear, keep: Tensor, values: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[:, keep] * values)
    linear.in_features = len(keep)


def _keep_channels(layer: Any, keep: Tensor) -> None:
    layer.conv.weight = _chosen(layer.conv.weight, keep)
    if layer.conv.bias is not None:
        layer.conv.bias = _chosen(layer.conv.bias, keep)
    norm = getattr(layer, "layer_norm", None)
    if norm is not None:
        norm.weight, norm.bias = _chosen(norm.weight, keep), _chosen(norm.bias, keep)
        if isinstance(norm, nn.GroupNorm):
            norm.num_groups = norm.num_channels = len(keep)
        else:
            norm.normalized_shape = (len(keep),)


def _keep_projected(front: Any, mask: Tensor, keep: Tensor) -> None:
    """The norm and projection behind the last convolution."""
    if not hasattr(front, "layer_norm"):
        _keep_inputs(front.projection, keep, mask[keep])
        return
    gone = (mask == 0).nonzero().flatten()
    norm, projection = front.layer_norm, front.projection
    front.layer_norm = KeptNorm(norm, keep, mask[keep])
    front.projection = KeptProjection(projection, norm, keep, gone)


def _keep_heads(layer: Any, keep: Tensor, values: Tensor) -> None:
    attention = layer.attention
    wide = attention.head_dim
    rows = (keep[:, None] * wide + torch.arange(wide, device=keep.device)).flatten()
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        _keep_outputs(linear, rows)
    _keep_inputs(attention.out_proj, rows, values.repeat_interleave(wide))
    if hasattr(attention, "gru_rel_pos_linear"):
        layer.attention = RelativeAttention(attention)
        layer.attention.gru_rel_pos_const = _chosen(attention.gru_rel_pos_const, keep, dim=1)
        layer.attention.heads, layer.attention.num_heads = keep, len(keep)
    elif len(keep) == 0:
        layer.attention = NoHeads(attention)
    else:
        attention.num_heads = len(keep)


@torch.no_grad()
def magnitude_masks(model: nn.Module, parameters: int, kinds: Sequence[str] = UNITS) -> dict[str, Float[Tensor, " n"]]:
    """Masks of 0 and 1 by the size of weights alone, the baseline of one-shot pruning: the structures with the largest
    root mean square weight, divided by the mean of their group, stay, as many as fit into `parameters`.

    Every group keeps at least one structure. Raises RoleError if even that is more than `parameters`.
    """
    plan = layout(model)
    scores = _scores(model, kinds)
    order = sorted(((float(v), name, i) for name, score in scores.items() for i, v in enumerate(score)))
    masks = {name: torch.ones_like(score) for name, score in scores.items()}
    left = {name: len(score) for name, score in scores.items()}
    for _, name, i in order:
        if plan.count(left) <= parameters:
            break
        if left[name] > 1:
            masks[name][i] = 0
            left[name] -= 1
    require(plan.count(left) <= parameters, f"one structure in every group makes {plan.count(left)} parameters, more "
            f"than the {parameters} wanted", RoleError)
    return masks


def _scores(model: nn.Module, kinds: Sequence[str]) -> dict[str, Tensor]:
    convs, layers = _parts(model)
    found: dict[str, Tensor] = {}
    for i, conv in enumerate(convs):
        found[f"conv_{i}"] = conv.conv.weight.flatten(1).square().mean(1).sqrt()
    for i, layer in enumerate(layers):
        attention, block = layer.attention, layer.feed_forward
        split = (-1, attention.head_dim, attention.out_proj.out_features)
        rows = [m.weight.view(split) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
        rows.append(attention.out_proj.weight.T.reshape(split))
        found[f"head_{i}"] = torch.stack([r.square().mean((1, 2)) for r in rows]).mean(0).sqrt()
        both = torch.stack([block.intermediate_dense.weight, block.output_dense.weight.T])
        found[f"unit_{i}"] = both.square().mean((0, 2)).sqrt()
    return {name: score / score.mean() for name, score in found.items() if name.partition("_")[0] in kinds}
