"""Outputs of a teacher, computed once for a data set and kept on disk (`stillhouse.data.kept`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stillhouse.data.fixed_views import FixedViews, with_views
from stillhouse.data.kept import Kept, Writer, keys_of, token_keys
from stillhouse.data.sets import fetch
from stillhouse.diffusion.grids import uniform
from stillhouse.diffusion.samplers import ode_endpoint
from stillhouse.errors import DataError, RoleError, require
from stillhouse.protocols import (
    PROBES,
    CausalLM,
    Classifier,
    Encoder,
    SpeechEncoder,
    TextClassifier,
    TextEncoder,
    TopKTeacher,
)
from stillhouse.run.check import check
from stillhouse.run.objects import fingerprint, frozen
from stillhouse.run.reading import to_device
from stillhouse.run.seeds import derive

Role = Literal["classifier", "encoder", "text-classifier", "text-encoder", "speech-encoder", "causal-lm"]
Dtype = Literal["float32", "float16", "uint8"]
KINDS: dict[str, Any] = {"classifier": Classifier, "encoder": Encoder, "text-classifier": TextClassifier,
                         "text-encoder": TextEncoder, "speech-encoder": SpeechEncoder, "causal-lm": CausalLM}
BLOCK_BYTES = 1 << 24
LEVELS = 254


def cache_outputs(
    teacher: Any,
    data: Any,
    folder: Path | str,
    role: Role = "classifier",
    *,
    top_k: int = 32,
    temperature: float = 1.0,
    dtype: Dtype = "float32",
    layers: Sequence[int] = (),
    views: int = 1,
    flip: bool = False,
    batch: int = 32,
    block: int | None = None,
    device: torch.device | str = "cpu",
    named: str = "",
    progress: Any = None,
) -> Path:
    """Send every sample of `data` through `teacher` and keep what comes out; the folder.

    Kept are, by `role`: the logits of a classifier, the features of an encoder (of pictures or texts), of a speech
    encoder the last hidden state and those of `layers` (0 is what enters the first), of a causal language model or a
    TopKTeacher the `top_k` largest log-probabilities at `temperature` for every real token. `dtype`: float32 as they
    are; float16; uint8, for log-probabilities alone, in 254 steps from 0 to the least of a position, so wrong by at
    most 1/508 of the least. The largest error that was made is kept beside them. `views` keeps that many fixed views of
    every picture (`stillhouse.data.fixed_views`), mirrored too with `flip`. `block` rows are written at a time (by
    default about 16 MiB); a cache that was interrupted goes on where it was and loses at most one block.
    `progress(done, rows)` is called after each block; `named` is what the teacher was called, for messages.

    Raises RoleError or DataError where teacher and data do not fit, StoreError where the folder belongs to another
    teacher, data set or setting, DataError for outputs that are not finite.
    """
    require(role in get_args(Role), f"role is one of {', '.join(get_args(Role))}, not {role!r}")
    require(dtype in get_args(Dtype), f"dtype is one of {', '.join(get_args(Dtype))}, not {dtype!r}")
    require(dtype != "uint8" or role == "causal-lm", "uint8 is for log-probabilities of a causal-lm; for a "
            f"{role} give float16 or float32")
    require(min(top_k, batch, views) >= 1 and temperature > 0 and (block is None or block >= 1),
            f"top_k, batch, views and block are at least 1 and temperature above 0; got {top_k}, {batch}, {views}, "
            f"{block}, {temperature}")
    require(temperature == 1 or role == "causal-lm", "temperature is for the log-probabilities of a causal-lm; logits "
            "are kept as they are")
    require(not layers or role == "speech-encoder", "layers are for a speech-encoder")
    device = torch.device(device)
    kind = TopKTeacher if hasattr(teacher, "top_k") else KINDS[role]
    require(kind is not TopKTeacher or role == "causal-lm", f"{type(teacher).__name__} gives log-probabilities of "
            "tokens: its role is causal-lm", RoleError)
    require(kind is not TopKTeacher or temperature == 1, "a teacher that gives its largest log-probabilities gives "
            "them at temperature 1")
    check(kind, data, device, {"teacher": teacher})
    about = {"role": role, "teacher": fingerprint(teacher), "data": fingerprint(data), "dtype": dtype,
             "views": views, "flip": flip and views > 1, "temperature": temperature, "layers": list(layers),
             "top_k": top_k if role == "causal-lm" else 0, "named": named}
    if role == "causal-lm":
        with frozen(teacher), torch.no_grad():
            first = to_device(fetch(data, [0]), device)
            vocabulary = int(teacher.vocabulary if kind is TopKTeacher else PROBES[kind](teacher, first).shape[-1])
        top_k = min(top_k, vocabulary)
        about |= {"top_k": top_k, "vocabulary": vocabulary}
    source = with_views(data, views, flip=flip) if views > 1 else data
    writer = Writer(folder, about, len(source))
    with frozen(teacher), torch.no_grad():
        while writer.done < len(source):
            rows: list[dict[str, Tensor]] = []
            error, size, start = 0.0, 0, writer.done
            while start < len(source) and (size < BLOCK_BYTES if block is None else len(rows) * batch < block):
                end = min(start + batch, len(source), writer.done + block if block else len(source))
                part = to_device(fetch(source, range(start, end)), device)
                made = _outputs(teacher, part, role, kind, top_k, temperature, layers)
                fields, wrong = _rounded(made, dtype)
                rows.append(fields)
                error, start = max(error, wrong), end
                size += sum(v.numel() * v.element_size() for v in fields.values())
            writer.append({n: torch.cat([r[n] for r in rows]) for n in rows[0]}, error)
            if progress is not None:
                progress(writer.done, len(source))
    return writer.folder


def _outputs(teacher: Any, part: dict[str, Any], role: str, kind: Any, k: int, temperature: float,
             layers: Sequence[int]) -> dict[str, Tensor]:
    """What is kept of one batch, and its keys."""
    if role in ("classifier", "encoder"):
        return {"key": keys_of(part["image"]), "out": teacher(part["image"])}
    if role == "speech-encoder":
        made = teacher(part["audio"], output_hidden_states=True) if layers else teacher(part["audio"])
        require(all(-len(made.hidden_states) <= i < len(made.hidden_states) for i in layers) if layers else True,
                f"the teacher has no layers {list(layers)}", RoleError)
        return {"key": keys_of(part["audio"]), "out": made.last_hidden_state,
                **{f"hidden.{i}": made.hidden_states[i] for i in layers}}
    ids, mask = part["input_ids"], part.get("attention_mask")
    if role != "causal-lm":
        return {"key": token_keys(ids, mask), "out": teacher(ids, mask)}
    real = torch.ones_like(ids) if mask is None else mask
    if kind is TopKTeacher:
        log_p, index = teacher.top_k(ids, mask)
        log_p, index = log_p[..., :k], index[..., :k]
        require(not torch.isnan(log_p).any(), "the teacher gives values that are not finite", DataError)
    else:
        logits = teacher(input_ids=ids, attention_mask=mask).logits.float()
        log_p, index = (logits / temperature).log_softmax(-1).topk(k)
        finite = bool(torch.isfinite(log_p[real.bool()]).all())
        require(finite, "the teacher gives values that are not finite", DataError)
    return {"key": token_keys(ids, mask), "length": real.sum(1), "log_p": log_p[real.bool()].float(),
            "index": index[real.bool()].int()}


def _rounded(made: dict[str, Tensor], dtype: str) -> tuple[dict[str, Tensor], float]:
    """The fields as they are kept, on the CPU, and the largest error of rounding."""
    fields, error = {}, 0.0
    for name, value in made.items():
        value = value.detach().cpu()
        if not value.is_floating_point():
            fields[name] = value.contiguous()
            continue
        value = value.float()
        known = value > -torch.inf if name == "log_p" else torch.ones((), dtype=torch.bool)
        require(bool(torch.isfinite(value[known.expand_as(value)]).all()),
                "the teacher gives values that are not finite", DataError)
        if dtype == "uint8":
            scale = (-value.masked_fill(~known, 0).amin(-1) / LEVELS).clamp_min(1e-12)
            code = (-value / scale[..., None]).masked_fill(~known, LEVELS + 1).round().clamp(0, LEVELS + 1)
            fields[f"{name}.scale"], fields[name] = scale, code.to(torch.uint8)
            back = -code * scale[..., None]
        elif dtype == "float16":
            fields[name] = value.half()
            back = fields[name].float()
            require(bool(torch.isfinite(back[known.expand_as(back)]).all()), "the teacher gives values above 65504, "
                    "which float16 cannot hold; give --dtype float32", DataError)
        else:
            fields[name], back = value.contiguous(), value
        gap = (back - value).masked_fill(~known, 0).abs()
        error = max(error, float(gap.max()) if gap.numel() else 0.0)
    return fields, error


def cache_pairs(teacher: Any, data: Any, folder: Path | str, pairs: int, *, ode_steps: int = 32, batch: int = 256,
                block: int | None = None, seed: int = 0, device: torch.device | str = "cpu", named: str = "",
                progress: Any = None) -> Path:
    """Pairs of unit noise z and where the ODE of a Denoiser takes it in `ode_steps` Heun steps on the uniform grid,
    kept as `cache_outputs` keeps outputs; `condition` of pair i is that of sample i of `data`, begun again at its end.

    z of pair i is a function of (seed, i). `read_pairs` gives them back. Raises what `cache_outputs` does.
    """
    from stillhouse.protocols import Denoiser

    require(min(pairs, ode_steps, batch) >= 1, "pairs, ode_steps and batch are at least 1")
    device = torch.device(device)
    check(Denoiser, data, device, {"teacher": teacher})
    block = block or batch
    writer = Writer(folder, {"role": "denoiser", "teacher": fingerprint(teacher), "data": fingerprint(data),
                             "ode_steps": ode_steps, "seed": seed, "named": named}, pairs)
    with frozen(teacher) if hasattr(teacher, "parameters") else contextlib.nullcontext(), torch.no_grad():
        while writer.done < pairs:
            which = range(writer.done, min(writer.done + block, pairs))
            known = to_device(fetch(data, [i % len(data) for i in which]), device)
            shape = known["x"].shape[1:]
            z = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(derive("pair", seed, i)))
                             for i in which]).to(device)
            condition = known.get("condition")
            x = torch.cat([ode_endpoint(teacher, z[i : i + batch], uniform(ode_steps),
                                        None if condition is None else condition[i : i + batch])
                           for i in range(0, len(z), batch)])
            require(bool(torch.isfinite(x).all()), "the teacher gives values that are not finite", DataError)
            fields = {"key": keys_of(z).cpu(), "z": z.cpu(), "x": x.cpu()}
            writer.append(fields | ({} if condition is None else {"condition": condition.cpu()}))
            if progress is not None:
                progress(writer.done, pairs)
    return writer.folder


class Pairs:
    """The pairs in a folder of `cache_pairs`: a set with `z`, `x` and, where kept, `condition`, read from disk."""

    def __init__(self, folder: Path | str):
        self.kept = Kept(folder)
        role = self.kept.about.get("role")
        require(role == "denoiser", f"{folder} keeps outputs of a {role}, not pairs of a Denoiser", DataError)
        self.fields = tuple(self.kept.take(torch.tensor([0]))[0])

    def __len__(self) -> int:
        return self.kept.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = self.kept.take(torch.tensor([index % len(self)]))[0]
        return {"index": index % len(self), **{n: torch.tensor(v) for n, v in row.items()}}


__all__ = ["FixedViews", "Pairs", "cache_outputs", "cache_pairs", "with_views"]
