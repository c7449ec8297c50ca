"""Models of text of `transformers` as text classifiers and text encoders."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import RoleError, UnknownNameError, require
from stillhouse.hub.architectures import configuration, library_class

POOLING = ("mean", "first")


class TextModel(nn.Module):
    """A model of text of `transformers` (BERT, ModernBERT, DistilBERT, …) called as model(input_ids, attention_mask):
    class logits, or features where it has no classes.

    Features are the mean of the last hidden states over real tokens (`pooling` "mean") or that of the first real token
    ("first"). `features` asks for them of a classifier too.
    """

    def __init__(self, model: Any, pooling: str = "mean", features: bool = False):
        super().__init__()
        require(pooling in POOLING, f"pooling is {' or '.join(POOLING)}, not '{pooling}'", UnknownNameError)
        self.model, self.pooling, self.features = model, pooling, features

    def spec(self) -> dict[str, Any]:
        """All but the weights, for JSON."""
        return {"class": type(self.model).__name__, "config": configuration(self.model), "pooling": self.pooling,
                "features": self.features}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> TextModel:
        """A model as `spec` describes it, with fresh weights."""
        kind = library_class("transformers", spec["class"], "PreTrainedModel")
        return cls(kind(kind.config_class.from_dict(spec["config"])), spec["pooling"], spec["features"])

    @property
    def config(self) -> Any:
        """That of the model inside."""
        return self.model.config

    @property
    def classes(self) -> int:
        """Number of classes; 0 for a model without any."""
        return int(self.model.config.num_labels) if "ForSequenceClassification" in type(self.model).__name__ else 0

    def forward(self, input_ids: Int[Tensor, "batch length"],
                attention_mask: Tensor | None = None) -> Float[Tensor, "batch outputs"]:
        if self.features or not self.classes:
            return self.encode(input_ids, attention_mask)
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    def encode(self, input_ids: Int[Tensor, "batch length"],
               attention_mask: Tensor | None = None) -> Float[Tensor, "batch features"]:
        """One feature vector per text, of the model below the classes. Without a mask all tokens are real."""
        hidden = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.pooling == "first":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.long().argmax(1)]
        weight = mask.to(hidden.dtype)[..., None]
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def wrap_text(model: Any, kind: Any, name: str, pooling: str | None = None) -> TextModel:
    """A `transformers` model of text as a TextClassifier or TextEncoder. Raises RoleError for one that is neither."""
    what = f"'{name}' ({type(model).__name__})"
    config = model.config
    require(getattr(model, "main_input_name", "") == "input_ids", f"{what} is no model of text, which this role needs",
            RoleError)
    require(not config.is_encoder_decoder, f"{what} is an encoder-decoder; this role needs a model that reads text "
            "(such as BERT). Encoder-decoders fit a Seq2Seq role", RoleError)
    wrapped = TextModel(model, pooling or "mean", features=kind.__name__ == "TextEncoder")
    if kind.__name__ == "TextClassifier":
        require(wrapped.classes > 0, f"{what} has no classes, which this role needs; give its "
                "…ForSequenceClassification", RoleError)
        require(config.pad_token_id is not None or not hasattr(model, "score"), f"{what} reads the class at the last "
                "token before the padding, but its config.json names no pad_token_id", RoleError)
    return wrapped
