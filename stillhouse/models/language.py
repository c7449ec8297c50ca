"""Small decoder-only language models built from `transformers` configurations, and sampling from any such model.

The factories need the extra `hf`; the other functions ask a model for `.logits` and `generate` only, `next_tokens`
for `get_output_embeddings` too, if it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from stillhouse.data.text import attach_responses, left_padded_prompts, longest_prompt, trimmed
from stillhouse.errors import MissingExtraError, RoleError, require
from stillhouse.measures.language import Hidden, Logits, NextTokens, TopK
from stillhouse.measures.projected import same_vocabulary


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
    with _evaluating(model):
        whole = model.generate(input_ids=prompts, attention_mask=mask, max_new_tokens=max_new_tokens, num_beams=1,
                               eos_token_id=eos, pad_token_id=pad, **options)
    return trimmed(attach_responses(prompts, mask, whole[:, prompts.shape[1]:], eos, pad))


_PLAIN: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()
"""Of models that were looked at: their output layer then, and whether the logits are its product alone."""


def known_tokens(teacher: Any, batch: Mapping[str, Tensor]) -> NextTokens:
    """What a teacher says of the token after each position: `TopK` from a `protocols.TopKTeacher`, else as
    `next_tokens`."""
    if not hasattr(teacher, "top_k"):
        return next_tokens(teacher, batch)
    log_p, tokens = teacher.top_k(batch["input_ids"], batch["attention_mask"])
    return TopK(log_p, tokens, teacher.vocabulary)


def next_tokens(model: Any, batch: Mapping[str, Tensor]) -> Hidden | Logits:
    """What a model says of the token after each position of a batch, without logits of all of them where it can.

    A causal language model whose logits are nothing but W h gives `Hidden`: it is called as ever, but its output layer
    sees one position only. Which models these are is tried out once, on a few tokens, with hidden states so large that
    caps and scales of logits show (Gemma, Cohere, Granite). All others (a bias, LoRA on the output layer, a module
    without `get_output_embeddings`) give `Logits`.
    """
    head = plain_head(model, batch)
    if head is None:
        return Logits(_called(model, batch))
    seen: list[Tensor] = []

    def first_only(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden[:, :1]

    with _before(head, first_only):
        _called(model, batch)
    return Hidden(seen[0], head.weight)


def plain_head(model: Any, batch: Mapping[str, Tensor]) -> nn.Linear | None:
    """The output layer of a causal language model whose logits are its product with the last hidden states; None for
    any other. The model is left as it was."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear or head.bias is not None or type(head.weight) not in (nn.Parameter, Tensor):
        return None
    known = _PLAIN.get(model)
    if known is None or known[0]() is not head:
        known = _PLAIN[model] = (ref(head), _is_product(model, head, {n: batch[n][:2, :8].contiguous()
                                                                     for n in ("input_ids", "attention_mask")}))
    return head if known[1] else None


@torch.no_grad()
def _is_product(model: nn.Module, head: nn.Linear, batch: Mapping[str, Tensor]) -> bool:
    """Whether the logits are the output layer's product with what it is given, tried with logits of up to 100."""
    seen: list[Tensor] = []

    def large(hidden: Tensor) -> Tensor:
        seen.append(hidden[:, :1] * (100 / (hidden[:, :1] @ head.weight.T).abs().max().clamp_min(1e-9)))
        return seen[0]

    with _evaluating(model), _before(head, large), torch.autocast(head.weight.device.type, enabled=False):
        found = _called(model, batch)
    if len(seen) != 1 or seen[0].dim() != 3 or found.shape[:2] != seen[0].shape[:2]:
        return False
    expected = (seen[0] @ head.weight.T).float()
    return bool((found.float() - expected).abs().max() <= 0.01 * expected.abs().max())


@contextmanager
def _evaluating(*models: Any) -> Iterator[None]:
    modes = [(m, m.training) for model in models if isinstance(model, nn.Module) for m in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _before(head: nn.Linear, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it the output layer is given `change(hidden)`."""
    hook = head.register_forward_pre_hook(lambda _, given: (change(given[0]),))
    try:
        yield
    finally:
        hook.remove()


def _called(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def check_vocabularies(teacher: Any, student: Any, batch: Mapping[str, Tensor]) -> None:
    """Raise RoleError unless teacher (a CausalLM or a TopKTeacher) and student speak of one vocabulary; a TopKTeacher
    is asked for its answer to a small batch, and what it gives is checked."""
    few = {name: batch[name][:1, :2].contiguous() for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), _evaluating(teacher, student):
        ours = _called(student, few).shape[-1]
        if not hasattr(teacher, "top_k"):
            return same_vocabulary(_called(teacher, few).shape[-1], ours, RoleError)
        same_vocabulary(teacher.vocabulary, ours, RoleError)
        try:
            log_p, tokens = teacher.top_k(batch["input_ids"], batch["attention_mask"])
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise RoleError(f"teacher ({type(teacher).__name__}) could not process one batch as a TopKTeacher: "
                            f"{type(error).__name__}: {error}") from error
    wanted = tuple(batch["input_ids"].shape)
    require(log_p.shape == tokens.shape and log_p.shape[:2] == wanted and log_p.shape[-1] >= 1,
            f"teacher.top_k must give two tensors [batch, length, k], here {(*wanted, 'k')}; it gave "
            f"{tuple(log_p.shape)} and {tuple(tokens.shape)}", RoleError)
    total = log_p.exp().sum(-1)
    require(bool((total < 1.01).all()), "teacher.top_k must give log-probabilities at temperature 1; of a position "
            f"they sum to {total.max().item():.3g} (or are not finite)", RoleError)
    require(bool((total[:, :-1][batch["target_mask"][:, 1:].bool()] > 0).any()), "the teacher knows no next token at "
            "any target of the first sequences (log_p is -inf everywhere); was its cache made of this data?", RoleError)
