"""Small decoder-only language models built from `transformers` configurations, and sampling from any such model.

The factories need the extra `hf`; the other functions ask a model for `.logits` and `generate` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.data.text import attach_responses, left_padded_prompts, longest_prompt, trimmed
from stillhouse.errors import MissingExtraError, RoleError, require


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("language models need transformers: pip install 'stillhouse[hf]'") from error
    return transformers


def _special(bos: int, eos: int, pad: int) -> dict[str, int]:
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


def gpt2(
    vocabulary: int, width: int = 32, layers: int = 1, heads: int = 2, length: int = 64, dropout: float = 0.0,
    *, bos: int = 1, eos: int = 3, pad: int = 0,
) -> nn.Module:
    """A GPT-2 (learned positions, tied embeddings) with freshly drawn weights."""
    hf = _transformers()
    return hf.GPT2LMHeadModel(hf.GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers, n_head=heads, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout, **_special(bos, eos, pad)))


def opt(
    vocabulary: int, width: int = 32, layers: int = 1, heads: int = 2, length: int = 64, dropout: float = 0.0,
    *, bos: int = 1, eos: int = 3, pad: int = 0,
) -> nn.Module:
    """An OPT (positions counted from the attention mask) with freshly drawn weights."""
    hf = _transformers()
    return hf.OPTForCausalLM(hf.OPTConfig(
        vocab_size=vocabulary, max_position_embeddings=length, hidden_size=width, word_embed_proj_dim=width,
        num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=4 * width, dropout=dropout,
        attention_dropout=dropout, **_special(bos, eos, pad)))


def llama(
    vocabulary: int, width: int = 32, layers: int = 1, heads: int = 2, length: int = 64, dropout: float = 0.0,
    *, bos: int = 1, eos: int = 3, pad: int = 0,
) -> nn.Module:
    """A Llama (rotary positions, gated MLP, untied embeddings) with freshly drawn weights."""
    hf = _transformers()
    return hf.LlamaForCausalLM(hf.LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=length, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=3 * width, attention_dropout=dropout, **_special(bos, eos, pad)))


def special_tokens(model: Any, role: str = "student") -> tuple[list[int], int]:
    """The end-of-sequence ids and the padding id of a model, from its generation settings or its configuration.

    Without a padding id the first end-of-sequence id stands in. Raises RoleError if no end of sequence is known.
    """
    places: list[Any] = [getattr(model, "generation_config", None), getattr(model, "config", None)]
    eos: Any = next((i for p in places if (i := getattr(p, "eos_token_id", None)) is not None), None)
    pad = next((i for p in places if (i := getattr(p, "pad_token_id", None)) is not None), None)
    require(eos is not None, f"{role} ({type(model).__name__}) names no end-of-sequence token, so its answers cannot "
            "end; set model.generation_config.eos_token_id", RoleError)
    ends = [int(i) for i in eos] if isinstance(eos, list | tuple) else [int(eos)]
    return ends, ends[0] if pad is None else int(pad)


def check_room(role: str, model: Any, data: Any, max_new_tokens: int) -> None:
    """Raise RoleError if the longest prompt of `data` and `max_new_tokens` exceed the positions that `model` has."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    prompt = longest_prompt(data)
    require(positions is None or prompt + max_new_tokens <= positions, f"{role} ({type(model).__name__}) has "
            f"{positions} positions, too few for prompts of up to {prompt} tokens and max_new_tokens={max_new_tokens}; "
            "lower max_new_tokens or cut the prompts", RoleError)


@torch.no_grad()
def respond(
    model: Any, batch: Mapping[str, Tensor], max_new_tokens: int, *, eos: list[int], pad: int, sample: bool = True,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """The prompts of `batch` (what comes before `target_mask`) with responses by `model`, as a right-padded batch.

    Sampled with top-p 1 and no top-k, or greedy; in eval mode, which is restored. `target_mask` is 1 on the response
    up to and including its first end of sequence, so `target_mask.sum()` is the number of tokens generated.
    """
    prompts, mask = left_padded_prompts(batch, pad)
    options: dict[str, Any] = {"do_sample": False}
    if sample:
        options = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        whole = model.generate(input_ids=prompts, attention_mask=mask, max_new_tokens=max_new_tokens, num_beams=1,
                               eos_token_id=eos, pad_token_id=pad, **options)
    finally:
        for module, training in modes:
            module.training = training
    return trimmed(attach_responses(prompts, mask, whole[:, prompts.shape[1]:], eos, pad))
