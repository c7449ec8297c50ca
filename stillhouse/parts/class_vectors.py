"""Classes as vectors: what a text encoder says of their names, and the classifier that this makes of an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import require

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a photo of the {}.", "an image of a {}.", "one {}.")
"""Sentences around a class name; "{}" stands for it."""


def filled(template: str, names: Sequence[str]) -> list[str]:
    """The template with each name in the place of "{}"; underscores of names become spaces."""
    require(template.count("{}") == 1, f"a template has one {{}} for the class name, not {template!r}")
    return [template.replace("{}", name.replace("_", " ")) for name in names]


@torch.no_grad()
def class_vectors(
    dual: Any, names: Sequence[str], templates: Sequence[str] = TEMPLATES[:1], batch: int = 256
) -> Float[Tensor, "classes features"]:
    """w_c: the mean over the templates of the unit text vectors, brought to length 1 (Radford et al. 2021, 3.1.4).

    One text per class and template goes through the text encoder of the dual encoder, which is left as it was.
    """
    require(len(names) > 0 and len(templates) > 0, "class vectors need at least one name and one template")
    total: Any = 0
    for template in templates:
        texts = filled(template, names)
        total = total + torch.cat([F.normalize(dual.encode_text(texts[i : i + batch]), dim=-1)
                                   for i in range(0, len(texts), batch)])
    return F.normalize(total, dim=-1)


def cosine_logits(
    features: Float[Tensor, "batch features"], W: Float[Tensor, "classes features"], scale: float | Tensor = 1.0
) -> Float[Tensor, "batch classes"]:
    """z = s u W^T with u the features at length 1; W is taken as it is (unit rows)."""
    return scale * F.normalize(features, dim=-1) @ W.T
