"""What models say of next tokens without whole logits: which models it is done for, and that it is the same."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stillhouse.data import grammar as toy
from stillhouse.data.sets import fetch
from stillhouse.errors import RoleError
from stillhouse.evaluate.text import language_loss
from stillhouse.measures.language import (
    Hidden,
    Logits,
    TopK,
    language_cross_entropy,
    language_divergence,
    next_token_loss,
    token_divergence,
)
from stillhouse.measures.projected import plain_divergence, topk_divergence
from stillhouse.models import language
from stillhouse.models.language import check_vocabularies, next_tokens, plain_head

WORDS = len(toy.VOCABULARY)
transformers = pytest.importorskip("transformers")


@pytest.fixture
def batch():
    return fetch(toy.grammar("train", 6), range(6))


def tiny(name, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=3,
        **options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def lora_on_the_head():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(language.llama(WORDS, 16, 1, 2), LoraConfig(r=2, target_modules=["lm_head"]))


def lora_elsewhere():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(language.llama(WORDS, 16, 1, 2), LoraConfig(r=2, target_modules=["q_proj"]))


def biased():
    model = language.llama(WORDS, 16, 1, 2)
    model.lm_head = nn.Linear(16, WORDS)
    return model


class Called(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


PLAIN = {
    "gpt2": lambda: language.gpt2(WORDS), "opt": lambda: language.opt(WORDS), "llama": lambda: language.llama(WORDS),
    "qwen3": lambda: tiny("Qwen3"), "mistral": lambda: tiny("Mistral"), "lora elsewhere": lora_elsewhere,
    "gemma2 without a cap": lambda: tiny("Gemma2", final_logit_softcapping=None)}
OTHERS = {
    "gemma2": lambda: tiny("Gemma2"), "cohere": lambda: tiny("Cohere"),
    "granite": lambda: tiny("Granite", logits_scaling=8.0), "lora on the head": lora_on_the_head, "bias": biased,
    "not of transformers": lambda: Called(language.llama(WORDS))}


@pytest.mark.parametrize("name", list(PLAIN))
def test_hidden_states_and_projection_are_the_logits(batch, name):
    model = PLAIN[name]().train()
    said = next_tokens(model, batch)
    assert isinstance(said, Hidden) and said.vocabulary == WORDS
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(said.hidden @ said.weight.T, logits, rtol=1e-5, atol=1e-6)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", list(OTHERS))
def test_models_whose_logits_are_more_than_a_product_give_their_logits(batch, name):
    model = OTHERS[name]()
    said = next_tokens(model, batch)
    assert isinstance(said, Logits) and said.vocabulary == WORDS
    assert torch.equal(said.logits, model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)


def test_a_model_is_tried_once_and_again_with_a_new_output_layer(batch, monkeypatch):
    model, tries = language.llama(WORDS), []
    found = language._is_product
    monkeypatch.setattr(language, "_is_product", lambda *a: tries.append(1) or found(*a))
    assert plain_head(model, batch) is plain_head(model, batch) is model.lm_head
    assert len(tries) == 1
    model.lm_head = nn.Linear(32, WORDS, bias=False)
    assert plain_head(model, batch) is model.lm_head and len(tries) == 2


def test_dropout_draws_what_it_would_have_drawn(batch):
    model = language.gpt2(WORDS, dropout=0.3).train()
    next_tokens(model, batch)
    torch.manual_seed(3)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.manual_seed(3)
    said = next_tokens(model, batch)
    torch.testing.assert_close(said.hidden @ said.weight.T, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["kl", "jeffreys", "skew_reverse_kl", "generalized_jsd"])
def test_every_pair_of_forms_gives_one_divergence_and_one_gradient(batch, kind):
    teacher, student = (language.llama(WORDS, seed_width).double() for seed_width in (16, 8))
    mask, measure = batch["target_mask"], plain_divergence(kind, 0.3)
    logits = [next_tokens(m, batch) for m in (teacher, student)]
    logits = [Logits(said.hidden @ said.weight.T) for said in logits]
    with torch.no_grad():
        known = next_tokens(teacher, batch)
        log_p, tokens = logits[0].logits.log_softmax(-1).topk(WORDS, -1)
    expected, count = token_divergence(measure, logits[0].logits.detach(), logits[1].logits, mask)
    slopes = torch.autograd.grad(expected, list(student.parameters()))
    assert count == mask[:, 1:].sum()
    for p in (known, Logits(logits[0].logits.detach()), TopK(log_p, tokens, WORDS)):
        for q in (lambda: next_tokens(student, batch), lambda: Logits(student(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)):
            found, counted = language_divergence(p, q(), mask, kind, 0.3)
            assert counted == count and math.isclose(found.item(), expected.item(), rel_tol=1e-9)
            for ours, theirs in zip(torch.autograd.grad(found, list(student.parameters())), slopes, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_positions_of_which_the_teacher_knows_nothing_are_not_counted(batch):
    student, mask = language.llama(WORDS).double(), batch["target_mask"]
    said = next_tokens(student, batch)
    log_p, tokens = (said.hidden @ said.weight.T + 1).detach().roll(1, -1).log_softmax(-1).topk(4, -1)
    targets = mask[:, 1:].bool()
    targets[::2] = False
    log_p[::2], tokens[::2] = -torch.inf, 0
    found, count = language_divergence(TopK(log_p, tokens, WORDS), said, mask, "kl")
    expected = topk_divergence(log_p[:, :-1][targets], tokens[:, :-1][targets],
                               (said.hidden @ said.weight.T)[:, :-1][targets], "kl", reduction="sum")
    assert count == targets.sum() < mask[:, 1:].sum() and found.item() == pytest.approx(expected.item(), rel=1e-10)
    nothing = TopK(torch.full_like(log_p, -torch.inf), torch.zeros_like(tokens), WORDS)
    for form in (said, Logits(said.hidden @ said.weight.T)):
        zero, none = language_divergence(nothing, form, mask, "kl")
        assert zero.item() == none.item() == 0 and zero.requires_grad


def test_cross_entropy_and_validation_loss_are_the_same_without_logits(batch):
    model = language.llama(WORDS).double()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected, count = next_token_loss(logits, batch["input_ids"], batch["target_mask"])
    for said in (next_tokens(model, batch), Logits(logits)):
        found, counted = language_cross_entropy(said, batch["input_ids"], batch["target_mask"])
        assert counted == count and math.isclose(found.item(), expected.item(), rel_tol=1e-12)
    data = toy.grammar("validation", 20)
    assert math.isclose(language_loss(model, data), language_loss(model, data, whole_logits=False), rel_tol=1e-12)


def test_two_vocabularies_are_refused_with_what_can_be_done(batch):
    teacher, student = language.llama(41), language.llama(WORDS)
    with pytest.raises(RoleError, match=rf"teacher has 41 vocabulary entries and the student {WORDS}.*share a tokenizer"
                                        ".*answered_by"):
        language_divergence(next_tokens(teacher, batch), next_tokens(student, batch), batch["target_mask"])
    with pytest.raises(RoleError, match="teacher has 41"):
        check_vocabularies(teacher, student, batch)


def test_on_the_command_line_a_cache_or_an_endpoint_is_a_teacher_of_k_tokens(monkeypatch):
    from stillhouse.cli.resolving import resolve_roles
    from stillhouse.hub import models
    from stillhouse.systems.language import distillm

    asked = []

    def resolve_model(text, kind, **_):
        asked.append((text, kind.__name__))

    monkeypatch.setattr(models, "resolve_model", resolve_model)
    options = SimpleNamespace(arch=None, seed=0, columns=None)
    for text in ("hf:some/model", "cache:some/folder", "api:some/url"):
        resolve_roles(distillm, {}, {"teacher": text, "student": "hf:a/b"}, options)
    assert [kind for text, kind in asked if text != "hf:a/b"] == ["CausalLM", "TopKTeacher", "TopKTeacher"]
    assert all(kind == "CausalLM" for text, kind in asked if text == "hf:a/b")
