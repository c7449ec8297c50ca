"""A recurrent language model with the interface of `transformers`, which needs no other library."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import require


class Said(NamedTuple):
    """What a language model returns."""

    logits: Float[Tensor, "batch length vocabulary"]


class LSTMLanguageModel(nn.Module):
    """Embeddings, `layers` LSTM layers and an output layer that shares the embeddings' weights (the language model of
    Zaremba et al. 2014 with the tying of Press and Wolf 2017). Right-padded batches need no mask; `generate` takes
    prompts that are padded on the left."""

    def __init__(self, vocabulary: int, width: int = 64, layers: int = 1, dropout: float = 0.0, *, bos: int = 1,
                 eos: int = 3, pad: int = 0):
        super().__init__()
        require(vocabulary >= 2 and width >= 1 and layers >= 1, "vocabulary must be 2 or more, width and layers 1 or "
                f"more; got {vocabulary}, {width} and {layers}")
        self.embed = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.drop = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.embed.weight
        self.config = SimpleNamespace(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Int[Tensor, "batch length"], attention_mask: Tensor | None = None) -> Said:
        return Said(self.head(self.drop(self.lstm(self.drop(self.embed(input_ids)))[0])))

    @torch.no_grad()
    def generate(self, input_ids: Int[Tensor, "batch length"], attention_mask: Tensor | None = None,
                 max_new_tokens: int = 20, do_sample: bool = False, temperature: float = 1.0,
                 eos_token_id: int | Sequence[int] | None = None, pad_token_id: int | None = None, **_: Any
                 ) -> Int[Tensor, "batch longer"]:
        """The prompts with what comes next, greedy or sampled (from all tokens); after an end of sequence padding."""
        eos = self.config.eos_token_id if eos_token_id is None else eos_token_id
        ends = torch.tensor([eos] if isinstance(eos, int) else list(eos), device=input_ids.device)
        pad = self.config.pad_token_id if pad_token_id is None else pad_token_id
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        state = tuple(torch.zeros(self.lstm.num_layers, len(input_ids), self.lstm.hidden_size,
                                  device=input_ids.device) for _ in range(2))
        ids, done = input_ids, torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for position in range(input_ids.shape[1] + max_new_tokens - 1):
            out, following = self.lstm(self.embed(ids[:, position : position + 1]), state)
            if position < input_ids.shape[1]:
                real = mask[:, position].bool()[None, :, None]
                following = tuple(torch.where(real, new, old) for new, old in zip(following, state, strict=True))
            state = following
            if position < input_ids.shape[1] - 1:
                continue
            logits = self.head(out[:, 0])
            token = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0] if do_sample else logits.argmax(-1)
            ids = torch.cat([ids, torch.where(done, pad, token)[:, None]], 1)
            done = done | torch.isin(token, ends)
            if bool(done.all()):
                break
        return ids
