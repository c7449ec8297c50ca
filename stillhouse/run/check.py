"""The check before any work: one real batch through each role."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.data.sets import TensorSet, column, fetch
from stillhouse.errors import DataError, RoleError
from stillhouse.protocols import NEEDS, PROBES, modules_of
from stillhouse.run.reading import is_map_style, to_device

SAME = {"Classifier": "classes", "CausalLM": "vocabulary entries"}
BATCH = 4


def check(protocol: Any, data: Any, device: torch.device, roles: dict[str, Any], labels: bool = False
          ) -> dict[str, Any]:
    """Send the first samples of `data` through every role and compare what comes out; those samples, on `device`.

    Models are left as found (mode, buffers, gradients). Roles that are None are skipped; lists are checked one by one.
    For classifiers and language models all roles must have the same number of classes or the same vocabulary. With
    `labels`, the data must have them, and every role a class for each (of the first samples only, where the set would
    have to decode everything to tell: no `column`).

    Raises DataError (empty, missing field, not finite) or RoleError (named by role).
    """
    kind = protocol.__name__
    batch = to_device(first_batch(data, (*NEEDS.get(protocol, ()), *(("label",) if labels else ()))), device)
    widths: dict[str, int] = {}
    for role, model in _flat(roles):
        out = _probe(protocol, role, model, batch)
        if protocol.__name__ == "Denoiser" and out.shape != batch["x"].shape:
            raise RoleError(f"{role}: a Denoiser returns x0 in the shape of its input, {tuple(batch['x'].shape)}; this "
                            f"one returned {tuple(out.shape)}")
        widths[role] = out.shape[-1]
    if kind in SAME and len(set(widths.values())) > 1:
        found = ", ".join(f"{role} has {n}" for role, n in widths.items())
        raise RoleError(f"all must have the same number of {SAME[kind]}, but {found}. Replace the last layer of one of "
                        "them, or give models made for the same task.")
    if labels:
        known = isinstance(data, TensorSet) or hasattr(data, "column")
        _check_labels(column(data, "label") if known else batch["label"], widths)
    return batch


def _check_labels(label: Tensor, widths: dict[str, int]) -> None:
    if label.is_floating_point() or label.is_complex():
        raise DataError(f"labels are whole numbers; got {label.dtype} of shape {tuple(label.shape)}")
    if label.dim() > 1:  # one for each token or place, some of them ignored
        return
    low, high = int(label.min()), int(label.max())
    for role, classes in widths.items():
        if low < 0 or high >= classes:
            raise RoleError(f"labels lie between {low} and {high}, but {role} has {classes} classes, 0 to "
                            f"{classes - 1}; number the labels so, or give a {role} with a class for each")


def first_batch(data: Any, needs: tuple[str, ...] = ()) -> dict[str, Any]:
    """The first few samples of a data set, checked: not empty, the needed fields there, every number finite."""
    if data is None:
        raise DataError("no data was given; give at least one sample")
    if not is_map_style(data):
        raise DataError(f"expected a map-style set of dicts, got {type(data).__name__}; wrap tensors with "
                        "stillhouse.data.sets.TensorSet(image=…)")
    if len(data) == 0:
        raise DataError("the data set is empty; give at least one sample")
    batch = fetch(data, list(range(min(BATCH, len(data)))))
    absent = [name for name in needs if name not in batch]
    if absent:
        raise DataError(f"the data has no field '{absent[0]}' (it has {', '.join(n for n in batch if n != 'index')}); "
                        "name its fields accordingly")
    whole = data.data if isinstance(data, TensorSet) else batch
    for name, value in whole.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            finite = torch.isfinite(value).flatten(1).all(1) if value.dim() > 1 else torch.isfinite(value)
            if not finite.all():
                bad = (~finite).nonzero().flatten().tolist()
                raise DataError(f"field '{name}' is not finite in {len(bad)} sample(s), first at index {bad[0]}; "
                                "remove or repair them")
    return batch


def _flat(roles: dict[str, Any]) -> list[tuple[str, Any]]:
    pairs = []
    for role, model in roles.items():
        if isinstance(model, list | tuple):
            pairs += [(f"{role}[{i}]", m) for i, m in enumerate(model)]
        elif model is not None:
            pairs.append((role, model))
    return pairs


def _probe(protocol: Any, role: str, model: Any, batch: dict[str, Any]) -> Tensor:
    kind = protocol.__name__
    if not (callable(model) or hasattr(model, "top_k")):
        raise RoleError(f"{role} must be a {kind}, a callable nn.Module; got {type(model).__name__}")
    modes = [(m, m.training) for top in modules_of(model) for m in top.modules()]
    buffers = [(b, b.clone()) for top in modules_of(model) for b in top.buffers()]
    try:
        if isinstance(model, nn.Module):
            model.eval()
        home = next((t.device for top in modules_of(model) for t in top.parameters()), None)
        with torch.no_grad():
            out = PROBES[protocol](model, batch if home is None else to_device(batch, home))
    except Exception as error:
        shapes = {n: tuple(v.shape) for n, v in batch.items() if isinstance(v, Tensor) and n != "index"}
        raise RoleError(f"{role} ({type(model).__name__}) could not process one batch as a {kind} "
                        f"({(protocol.__doc__ or '').strip().splitlines()[0]}): {type(error).__name__}: {error}. The "
                        f"batch was {shapes}.") from error
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    if not isinstance(out, Tensor):
        raise RoleError(f"{role} ({type(model).__name__}) must return a tensor as a {kind}; it returned "
                        f"{type(out).__name__}")
    size = len(next(v for n, v in batch.items() if isinstance(v, Tensor) and n != "index"))
    if out.dim() < 2 or len(out) != size:
        raise RoleError(f"{role} must return one row per sample as a {kind}: {size} samples gave {tuple(out.shape)}")
    if not torch.isfinite(out).all():
        raise RoleError(f"{role} ({type(model).__name__}) gives values that are not finite on the first batch; are its "
                        "weights loaded?")
    return out
