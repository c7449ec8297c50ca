"""DistiLLM: its schedule, its buffer, what is trained on what, and real transformers models with and without LoRA."""

import dataclasses
import math
from collections import Counter
from typing import get_args

import pytest
import torch

from stillhouse.data import grammar as toy
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.measures import divergences
from stillhouse.measures.projected import plain_divergence
from stillhouse.models import language
from stillhouse.parts.replay import ReplayBuffer
from stillhouse.run import Run
from stillhouse.systems.language import distillm
from stillhouse.systems.language.distillm import Config, adapt, choose, distill, generation_share, tiny
from stillhouse.testing import check_system

OFFLINE = {"phi": 0.0, "phi_step": 0.0, "fine_tuning": 0.0, "select": "last"}


def given(**settings):
    inputs = tiny()
    return {**inputs, "config": dataclasses.replace(inputs["config"], **settings)}


def finish(inputs, run=None):
    run = run or Run(quiet=True)
    student = distill(**inputs, run=run)
    return student, run.history[-1]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_contract():
    """Resumed after every step, with buffer, phi, corpus and best checkpoint in play, it ends bit for bit the same."""
    _, account = finish(tiny())
    assert account["fresh"] >= 2 and account["replayed"] >= 1 and account["fixed"] >= 1 and account["phi"] > 0.7
    check_system(distill)


# ------------------------------------------------------------------ exact checks


def test_phi_rises_only_when_validation_worsens_by_eps():
    phi, reference = 0.0, 2.0
    for loss in (1.9, 1.5, 1.2, 2.05):
        phi, reference = adapt(phi, reference, loss, eps=0.1, step=0.1)
        assert (phi, reference) == (0.0, 2.0)
    seen = []
    for loss in (2.15, 2.30, 2.45):
        phi, reference = adapt(phi, reference, loss, eps=0.1, step=0.1)
        seen.append(round(phi, 12))
        assert reference == loss
    assert seen == [0.1, 0.2, 0.3]
    assert adapt(0.95, 1.0, 2.0, 0.1, 0.1) == (1.0, 2.0)


def test_small_rises_accumulate_against_the_reference():
    phi, reference = 0.0, 2.0
    for loss in (2.06, 2.09, 2.12):
        phi, reference = adapt(phi, reference, loss, eps=0.1, step=0.1)
    assert (phi, reference) == (0.1, 2.12)


def test_generation_shares():
    assert [generation_share(0.8, p, "decreasing") for p in (0.0, 0.25, 1.0)] == pytest.approx([0.8, 0.6, 0.0])
    assert [generation_share(0.8, p, "constant") for p in (0.0, 0.9)] == pytest.approx([0.4, 0.4])
    assert [generation_share(0.8, p, "increasing") for p in (0.0, 0.25)] == pytest.approx([0.0, 0.2])


def test_where_a_steps_sequences_come_from():
    full, filling = ReplayBuffer(1), ReplayBuffer(2)
    for buffer in (full, filling):
        buffer.push({"x": torch.zeros(1, 1)})
    assert choose(0.5, 0.4, 0.2, full) == "fixed"
    assert choose(0.3, 0.4, 0.2, full) == "replayed"
    assert choose(0.3, 0.4, 0.2, filling) == "fresh"
    assert choose(0.1, 0.4, 0.2, full) == "fresh"
    assert choose(0.3, 0.4, 0.2, ReplayBuffer(0)) == "fresh"
    assert choose(0.0, 0.0, 0.0, full) == "fixed"


def measure_of(config):
    return plain_divergence(config.divergence, config.alpha)


def test_the_skew_of_a_config_is_towards_the_teacher_and_bounded():
    p, q = torch.tensor([[0.0, -math.inf]]).double(), torch.tensor([[-math.inf, 0.0]]).double()
    assert measure_of(Config())(p, q).item() == pytest.approx(math.log(10))
    assert measure_of(Config(divergence="skew_reverse_kl"))(p, q).item() == pytest.approx(math.log(10))
    p, q = torch.randn(2, 5, 7, dtype=torch.float64).unbind(0)
    assert torch.equal(measure_of(Config(alpha=0.0))(p, q), divergences.kl(p, q))
    assert measure_of(Config(alpha=1.0))(p, q).item() == 0
    assert torch.equal(measure_of(Config(divergence="reverse_kl"))(p, q), divergences.kl(q, p))
    assert torch.equal(measure_of(Config(divergence="generalized_jsd", alpha=0.5))(p, q), divergences.js(p, q))


# ------------------------------------------------------------------ what is trained on what


class Spy(torch.nn.Module):
    """A language model that remembers what it was shown and what it generated."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shown, self.generated = model, [], []
        self.config, self.generation_config = model.config, model.generation_config

    def forward(self, input_ids, attention_mask=None):
        if self.training or not any(p.requires_grad for p in self.parameters()):
            self.shown.append((input_ids.clone(), attention_mask.clone()))
        return self.model(input_ids=input_ids, attention_mask=attention_mask)

    def generate(self, input_ids, **options):
        assert not self.model.training
        whole = self.model.generate(input_ids=input_ids, **options)
        self.generated.append(whole[:, input_ids.shape[1]:])
        return whole


def spied(**settings):
    inputs = given(**{"fine_tuning": 0.0, "k": 1.0, "phi_step": 0.0, "select": "last", **settings})
    inputs.update(teacher=Spy(inputs["teacher"]), student=Spy(inputs["student"]), corpus=None)
    _, account = finish(inputs)
    teacher = [(ids, mask) for ids, mask in inputs["teacher"].shown if len(ids) > 4][-8:]
    student = [(ids, mask) for ids, mask in inputs["student"].shown if len(ids) > 4][-8:]
    return inputs, teacher, student, account


def test_on_policy_both_models_see_what_the_student_just_wrote_up_to_its_first_end():
    inputs, teacher, student, account = spied(phi=1.0, replay=0)
    generated = inputs["student"].generated
    assert len(generated) == account["fresh"] == 8 and account["fixed"] == account["replayed"] == 0
    tokens = 0
    for (ids, mask), (same_ids, same_mask), written in zip(teacher, student, generated, strict=True):
        assert torch.equal(ids, same_ids) and torch.equal(mask, same_mask)
        for row, real, new in zip(ids, mask.bool(), written.tolist(), strict=True):
            cut = new[: new.index(toy.EOS) + 1] if toy.EOS in new else new
            text = row[real].tolist()
            assert text[text.index(toy.SEP) + 1 :][-len(cut):] == cut
            tokens += len(cut)
    assert account["tokens"] == tokens


def test_replayed_sequences_were_generated_before_and_cost_nothing():
    inputs, teacher, _, account = spied(phi=1.0, replay=6, share="constant", steps=12)
    assert account["replayed"] > 0 and account["fresh"] == len(inputs["student"].generated) < 12
    written = Counter()
    for new in inputs["student"].generated:
        written.update(tuple(n[: n.index(toy.EOS) + 1] if toy.EOS in n else n) for n in new.tolist())
    for ids, mask in teacher:
        for row, real in zip(ids, mask.bool(), strict=True):
            text = row[real].tolist()
            assert any(tuple(text[i:]) in written for i in range(len(text)))


def test_off_line_the_data_is_used_and_nothing_generated():
    inputs, teacher, student, account = spied(**OFFLINE)
    known = {tuple(row) for row in inputs["data"].input_ids.tolist()}
    assert account["fixed"] == 8 and account["tokens"] == 0 and not inputs["student"].generated
    assert all(tuple(row) in known for ids, _ in teacher + student for row in ids.tolist())


def test_with_k_0_it_is_fine_tuning_and_the_teacher_does_not_matter():
    results = []
    for seed in (1, 2):
        inputs = given(**OFFLINE, k=0.0)
        torch.manual_seed(seed)
        inputs["teacher"] = language.llama(len(toy.VOCABULARY), 16, 1, 2)
        results.append(weights(finish(inputs)[0]))
    assert torch.equal(*results)
    assert not torch.equal(results[0], weights(finish(given(**OFFLINE, k=1.0))[0]))


def test_the_corpus_and_each_setting_change_the_result():
    base = weights(finish(given(**OFFLINE, k=1.0))[0])
    for settings in ({"lm": 0.0}, {"alpha": 0.5}, {"divergence": "kl"}, {"phi": 1.0}, {"k": 0.5}):
        assert not torch.equal(base, weights(finish(given(**{**OFFLINE, "k": 1.0, **settings}))[0])), settings


def test_answers_are_cut_at_max_new_tokens_and_counted():
    inputs = given(**{**OFFLINE, "phi": 1.0, "replay": 0, "k": 1.0, "max_new_tokens": 1, "steps": 2})
    inputs["corpus"] = None
    _, account = finish(inputs)
    assert account["tokens"] == 2 * 6


def test_phi_follows_the_validation_loss():
    inputs, run = given(phi=0.0, phi_step=0.1, eps=1e-3, lr=1.0, clip=1e9, fine_tuning=0.0), Run(quiet=True)
    finish(inputs, run)
    seen = [(line["validation"], line["phi"]) for line in run.history if "validation" in line]
    assert seen[-1][1] > 0
    still, never = given(phi=0.0, eps=math.inf, fine_tuning=0.0), Run(quiet=True)
    finish(still, never)
    assert {line["phi"] for line in never.history if "phi" in line} == {0.0}


def test_the_best_checkpoint_is_returned():
    from stillhouse.evaluate.text import language_loss

    inputs, run = given(select="loss", steps=12, lr=0.3), Run(quiet=True)
    student, _ = finish(inputs, run)
    losses = [line["validation"] for line in run.history if line["stage"] == "distil" and "validation" in line]
    assert losses[-1] > min(losses)
    assert language_loss(student, inputs["validation"]) == pytest.approx(min(losses), abs=1e-5)


# ------------------------------------------------------------------ never all logits, and teachers of k tokens


class NoHead(torch.nn.Module):
    """A language model whose output layer is not known, so that its whole logits are asked for."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.generation_config = model, model.config, model.generation_config

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)

    def generate(self, **options):
        return self.model.generate(**options)


class KTokens:
    """The k likeliest tokens of a model; of positions in `unknown` nothing."""

    def __init__(self, model, k, unknown=()):
        self.model, self.k, self.unknown = model.eval(), k, unknown
        self.vocabulary = model.config.vocab_size

    @torch.no_grad()
    def top_k(self, input_ids, attention_mask=None):
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        log_p, tokens = logits.log_softmax(-1).topk(self.k, -1)
        for at in self.unknown:
            log_p[:, at], tokens[:, at] = -math.inf, 0
        return log_p, tokens


@pytest.mark.parametrize("divergence", list(get_args(distillm.Divergence)))
def test_without_all_logits_it_is_the_same_training(divergence):
    ends = []
    for wrap in (lambda m: m, NoHead):
        inputs = given(divergence=divergence, lr=1e-3, fine_tuning=0.0, select="last", steps=5)
        inputs.update(teacher=wrap(inputs["teacher"].double()), student=wrap(inputs["student"].double()))
        finish(inputs)
        ends.append(weights(inputs["student"]))
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-8)


def test_no_tensor_of_batch_times_length_times_vocabulary_is_made(monkeypatch):
    inputs = given(**OFFLINE, k=0.5)
    seen = []
    for model in (inputs["teacher"], inputs["student"]):
        model.lm_head.register_forward_hook(lambda m, given, out: seen.append(out.shape[1]))
    before = {name: len(m._forward_pre_hooks) for name, m in inputs["student"].named_modules()}
    finish(inputs)
    longest = inputs["data"].input_ids.shape[1]
    widths = Counter(seen)
    assert widths[1] > 3 * 8 and widths[longest] <= 8  # the checks before the run look at whole logits
    assert before == {name: len(m._forward_pre_hooks) for name, m in inputs["student"].named_modules()}


@pytest.mark.parametrize("divergence", list(get_args(distillm.Divergence)))
def test_a_teacher_of_all_tokens_is_the_teacher(divergence):
    ends = []
    for wrap in (lambda m: m, lambda m: KTokens(m, len(toy.VOCABULARY))):
        inputs = given(divergence=divergence, lr=1e-3, fine_tuning=0.0, select="last", steps=5)
        inputs.update(teacher=wrap(inputs["teacher"].double()), student=inputs["student"].double())
        _, account = finish(inputs)
        assert account["fresh"] + account["replayed"] > 0
        ends.append(weights(inputs["student"]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wrap", [lambda m: m, NoHead])
def test_a_teacher_of_few_tokens_trains_and_resumes(wrap):
    def inputs():
        found = tiny()
        return {**found, "teacher": KTokens(found["teacher"], 3, unknown=(0, 4)), "student": wrap(found["student"])}

    before = weights(inputs()["student"])
    student, account = finish(inputs())
    assert account["fresh"] > 0 and not torch.equal(before, weights(student))
    assert torch.isfinite(weights(student)).all()
    check_system(distill, inputs)


def test_a_teacher_of_few_tokens_that_does_not_fit_is_refused_before_any_step():
    class Of41(KTokens):
        vocabulary = property(lambda self: 41, lambda self, value: None)

    class Shapeless(KTokens):
        def top_k(self, input_ids, attention_mask=None):
            return tuple(x[:, 1:] for x in super().top_k(input_ids, attention_mask))

    class NoLogs(KTokens):
        def top_k(self, input_ids, attention_mask=None):
            log_p, tokens = super().top_k(input_ids, attention_mask)
            return log_p.exp(), tokens

    class Broken(KTokens):
        def top_k(self, input_ids, attention_mask=None):
            raise ValueError("it is not in the cache")

    everywhere = range(tiny()["data"].input_ids.shape[1])
    for teacher, words in [(Of41(tiny()["teacher"], 3), "teacher has 41 vocabulary entries and the student 36"),
                           (Shapeless(tiny()["teacher"], 3), r"two tensors \[batch, length, k\]"),
                           (NoLogs(tiny()["teacher"], 3), "log-probabilities at temperature 1"),
                           (Broken(tiny()["teacher"], 3), "as a TopKTeacher: ValueError: it is not in the cache"),
                           (KTokens(tiny()["teacher"], 3, everywhere), "knows no next token")]:
        run = Run(quiet=True)
        with pytest.raises(RoleError, match=words):
            distill(**{**tiny(), "teacher": teacher}, run=run)
        assert not run.begun


# ------------------------------------------------------------------ users' models


@pytest.mark.parametrize("factory", [language.gpt2, language.opt, language.llama])
def test_families_of_transformers(factory):
    torch.manual_seed(0)
    inputs = given(steps=4)
    inputs.update(teacher=factory(len(toy.VOCABULARY), 16, 2, 2), student=factory(len(toy.VOCABULARY), 8, 1, 2,
                                                                                  dropout=0.1))
    before = weights(inputs["student"])
    student, account = finish(inputs)
    assert account["fresh"] > 0 and torch.isfinite(weights(student)).all()
    assert not torch.equal(before, weights(student))


def lora_inputs():
    from peft import LoraConfig, get_peft_model

    inputs = given(steps=4, lr=0.05)
    inputs["student"] = get_peft_model(language.llama(len(toy.VOCABULARY), 8, 1, 2), LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    return inputs


def test_a_lora_student_trains_its_adapters_only_and_resumes():
    inputs = lora_inputs()
    before = {name: value.clone() for name, value in inputs["student"].named_parameters()}
    student, account = finish(inputs)
    changed = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert account["fresh"] > 0 and changed and all("lora" in name for name in changed)
    check_system(distill, lora_inputs)


def test_a_padding_id_that_is_the_end_of_sequence():
    torch.manual_seed(0)
    inputs = given(steps=4)
    inputs["student"] = language.gpt2(len(toy.VOCABULARY), 8, 1, 2, pad=toy.EOS)
    _, account = finish(inputs)
    assert account["tokens"] > 0


# ------------------------------------------------------------------ wrong input


def test_vocabularies_that_differ_are_refused_with_both_sizes():
    inputs = tiny()
    inputs["teacher"] = language.llama(41, 16, 1, 2)
    with pytest.raises(RoleError, match=r"teacher has 41 vocabulary entries and the student 36.*answered_by"):
        distill(**inputs)


def test_what_does_not_fit_is_named_before_any_step():
    with pytest.raises(RoleError, match="positions"):
        distill(**given(max_new_tokens=1000))
    inputs = tiny()
    with pytest.raises(DataError, match="target_mask"):
        distill(**{**inputs, "validation": inputs["validation"].without("target_mask")})
    for wrong in ({"alpha": 1.5}, {"k": -0.1}, {"phi": 2.0}, {"replay": -1}, {"max_new_tokens": 0}, {"steps": 0}):
        with pytest.raises(ConfigError):
            Config(**wrong)


def test_claims_read_what_the_experiment_measures():
    arm = {"rouge_l": 0.8, "grammatical": 0.9, "tokens": 100.0, "fresh": 3.0, "replayed": 2.0}
    arms = {name: dict(arm) for name in ("sft", "kl", "skl", "on_policy", "no_replay", "distillm")}
    arms["distillm"]["tokens"] = 10.0
    assert all(math.isfinite(claim.slack(arms)) for claim in distillm.CLAIMS)
    arms["distillm"]["replayed"] = 0.0
    assert distillm.CLAIMS[4].slack(arms) == 0


def test_a_set_of_a_users_own_is_read_through_its_items():
    """Not a TensorSet, no `batch`: a plain list of dicts."""
    data = toy.grammar("train", 12)
    items = [{k: v for k, v in data[i].items() if k != "index"} for i in range(12)]
    inputs = {**given(steps=3), "data": items}
    student, account = finish(inputs)
    assert account["fresh"] + account["replayed"] + account["fixed"] == 3
    assert torch.isfinite(weights(student)).all()
