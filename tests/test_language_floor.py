"""The language floor: the toy grammar, packing, masks, sampling, token losses, replay, ROUGE-L, fine-tuning."""

import math

import pytest
import torch

from stillhouse.data import grammar as toy
from stillhouse.data.sets import TensorSet
from stillhouse.data.text import (
    attach_responses,
    left_padded_prompts,
    longest_prompt,
    pack_ids,
    pack_pairs,
    pack_plain,
    response_ids,
    trimmed,
    widened,
)
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.evaluate.text import answer_all, language_loss, response_rouge, rouge_l, rouge_l_ids, teacher_nll
from stillhouse.measures import divergences
from stillhouse.measures.language import next_token_loss, sequence_nll, token_divergence
from stillhouse.models import language
from stillhouse.parts.best import Best
from stillhouse.parts.replay import ReplayBuffer
from stillhouse.recipes.language import FineTune, answered_by, fine_tune
from stillhouse.run import Run
from stillhouse.store import load_tree, save_tree
from stillhouse.testing import check_system


def lm(factory=language.llama, seed=0, width=16, **options):
    torch.manual_seed(seed)
    return factory(len(toy.VOCABULARY), width, 1, 2, 64, **options)


class Letters:
    """A tokenizer of single letters, ids from 4 up, in the manner of `transformers`."""

    eos_token_id, pad_token_id = 3, None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [4 + ord(c) - ord("a") for c in text]}


# ------------------------------------------------------------------ grammar


def test_every_answer_is_correct_and_none_is_listed_twice():
    for prompt, orders in [("list cat", 1), ("reverse cat oak sea", 1), ("name cat oak sea", 6)]:
        listed = toy.answers(prompt.split())
        assert len(listed) == len({tuple(a) for a in listed}) == orders * 2 * 3 * 3
        assert all(toy.is_correct(prompt.split(), a) for a in listed)


@pytest.mark.parametrize(("answer", "grammatical", "correct"), [
    ("biga cat bigo oak run", True, True),
    ("cat is olda and oak is oldo sing", True, True),
    ("bigo oak biga cat run", True, False),
    ("biga cat run", False, False),
    ("biga cat runs", True, False),
    ("biga cat biga oak run", False, False),
    ("biga cat oldo oak run", False, False),
    ("biga cat oak is bigo run", False, False),
    ("biga cat bigo oak runs", False, False),
    ("cat is olda oak is oldo sing", False, False),
    ("biga cat bigo oak run run", False, False),
    ("", False, False),
])
def test_the_judge(answer, grammatical, correct):
    assert toy.is_grammatical(answer.split()) == grammatical
    assert toy.is_correct(["list", "cat", "oak"], answer.split()) == correct


def test_sets_are_seeded_correct_padded_and_their_prompts_disjoint():
    sets = {split: toy.grammar(split, 150, seed=5) for split in ("train", "validation", "test")}
    assert torch.equal(sets["train"].input_ids, toy.grammar("train", 150, seed=5).input_ids)
    assert not torch.equal(sets["train"].input_ids, toy.grammar("train", 150, seed=6).input_ids)
    prompts = {}
    for split, data in sets.items():
        assert data.input_ids.shape == (150, toy.LENGTH)
        before = data.attention_mask - data.target_mask
        asked = [toy.decode(r)[1:-1] for r in response_ids(data.with_fields(target_mask=before).data)]
        for prompt, answer in zip(asked, response_ids(data.data), strict=True):
            assert toy.is_correct(prompt, toy.decode(answer)) and answer[-1] == toy.EOS
            assert len(answer) <= toy.LONGEST_ANSWER
        prompts[split] = {tuple(p) for p in asked}
        assert (data.input_ids[data.attention_mask == 0] == toy.PAD).all()
    assert not prompts["train"] & prompts["test"] and not prompts["validation"] & prompts["test"]
    with pytest.raises(DataError, match="split"):
        toy.grammar("dev", 3)


# ------------------------------------------------------------------ packing and masks


def test_packing_a_users_pairs():
    data = pack_pairs([("abc", "de"), ("a", "bcdefgh")], Letters(), length=8, prompt_length=3)
    assert data.input_ids.tolist() == [[4, 5, 6, 7, 8, 3, 3, 3], [1, 4, 5, 6, 7, 8, 9, 10]]
    assert data.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1] * 8]
    assert data.target_mask.tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]]
    with pytest.raises(DataError, match="response of pair 0 is empty"):
        pack_pairs([("a", "")], Letters())
    with pytest.raises(DataError, match="no pairs"):
        pack_pairs([], Letters())
    plain = pack_plain(["abc", "de"], Letters(), length=3)
    assert plain.input_ids.tolist() == [[4, 5, 6], [3, 7, 8]] and plain.target_mask.all()


def test_prompts_are_left_padded_and_responses_end_with_their_first_end_of_sequence():
    batch = pack_ids([([1, 9, 2], [8, 3]), ([1, 9, 9, 9, 2], [8, 8, 3])], pad=0).data
    prompts, mask = left_padded_prompts(batch, pad=0)
    assert prompts.tolist() == [[0, 0, 1, 9, 2], [1, 9, 9, 9, 2]] and mask.tolist() == [[0, 0, 1, 1, 1], [1] * 5]
    assert longest_prompt(TensorSet(**batch)) == 5
    responses = torch.tensor([[7, 3, 3, 5], [7, 7, 7, 7]])
    whole = trimmed(attach_responses(prompts, mask, responses, eos=[3], pad=3))
    assert whole["input_ids"].tolist() == [[1, 9, 2, 7, 3, 3, 3, 3, 3], [1, 9, 9, 9, 2, 7, 7, 7, 7]]
    assert whole["target_mask"].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0, 0], [0] * 5 + [1] * 4]
    assert whole["attention_mask"].tolist() == [[1] * 5 + [0] * 4, [1] * 9]
    wide = widened(whole, 12, pad=0)
    assert all(v.shape == (2, 12) for v in wide.values())
    assert all(torch.equal(v, whole[n]) for n, v in trimmed(wide).items() if n != "input_ids")
    with pytest.raises(DataError, match="no prompt"):
        left_padded_prompts({**batch, "target_mask": batch["attention_mask"]}, pad=0)


# ------------------------------------------------------------------ sampling


@pytest.mark.parametrize("factory", [language.gpt2, language.opt, language.llama])
def test_greedy_answers_do_not_depend_on_the_padding_of_the_batch(factory):
    """Each prompt answered alone, by hand, equals the answers of the padded batch."""
    model, data = lm(factory).double(), toy.grammar("train", 6, seed=1)
    together = answer_all(model, data, 5, sample=False)
    for i, answer in enumerate(response_ids(together)):
        ids = data.input_ids[i][(data.attention_mask - data.target_mask)[i].bool()][None]
        for token in answer:
            best = model(input_ids=ids).logits[0, -1].argmax()
            assert best == token
            ids = torch.cat([ids, best.view(1, 1)], 1)
        assert answer[-1] == toy.EOS or len(answer) == 5


def test_samples_follow_the_model_and_count_what_was_generated():
    """With top-k and top-p off, even the tail of the distribution is drawn; the model's mode is left as it was."""
    model = lm().train()
    data = TensorSet(**{n: v.expand(4000, -1) for n, v in toy.grammar("train", 1).data.items()})
    torch.manual_seed(0)
    answers = answer_all(model, data, 1, batch=4000)
    assert model.training and answers["target_mask"].sum() == 4000
    with torch.no_grad():
        prompt, mask = left_padded_prompts(data.batch([0]), 0)
        p = model(input_ids=prompt, attention_mask=mask).logits[0, -1].softmax(-1)
    drawn = torch.bincount(torch.tensor([row[0] for row in response_ids(answers)]), minlength=len(p)) / 4000
    assert (drawn - p).abs().max() < 5 * math.sqrt(p.max().item() / 4000)
    assert (drawn > 0).all()


def test_a_model_without_an_end_of_sequence_or_room_is_named():
    model = lm()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(RoleError, match="end-of-sequence"):
        language.special_tokens(model)
    with pytest.raises(RoleError, match=r"64 positions.*max_new_tokens=60"):
        language.check_room("student", lm(), toy.grammar("train", 50), 60)


# ------------------------------------------------------------------ losses


def test_token_losses_count_the_targets_only_and_agree_with_the_definition():
    model, batch = lm().double(), toy.grammar("train", 5).batch(range(5))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total, count = next_token_loss(logits, batch["input_ids"], batch["target_mask"])
    assert count == batch["target_mask"].sum()
    by_hand = -sum(logits[i, t - 1].log_softmax(-1)[batch["input_ids"][i, t]].item()
                   for i, t in batch["target_mask"].nonzero().tolist())
    assert total.item() == pytest.approx(by_hand, abs=1e-10)
    assert torch.allclose(sequence_nll(logits, batch["input_ids"], batch["target_mask"]).sum(), total)
    assert teacher_nll(model, batch) == pytest.approx(by_hand / count.item(), abs=1e-10)
    assert language_loss(model, toy.grammar("train", 5), batch=2) == pytest.approx(by_hand / count.item(), abs=1e-6)

    other = logits.detach() + torch.randn_like(logits)
    value, n = token_divergence(divergences.kl, other, logits, batch["target_mask"])
    (gradient,) = torch.autograd.grad(value, logits)
    assert n == count
    predicts = torch.nn.functional.pad(batch["target_mask"][:, 1:], (0, 1)).bool()
    assert (gradient[predicts].abs().sum(-1) > 0).all() and gradient[~predicts].abs().max() == 0
    assert torch.allclose(value, divergences.kl(other, logits, mask=predicts, reduction="sum"))


@pytest.mark.unchecked
def test_vocabularies_that_differ_are_refused_with_both_sizes():
    with pytest.raises(RoleError, match=r"36.*40"):
        token_divergence(divergences.kl, torch.zeros(1, 3, 36), torch.zeros(1, 3, 40), torch.ones(1, 3))


# ------------------------------------------------------------------ replay and best


def rows(*values):
    return {"input_ids": torch.tensor(values)[:, None]}


def test_replay_evicts_the_oldest_and_never_exceeds_its_capacity(tmp_path):
    buffer = ReplayBuffer(3)
    buffer.push(rows(1, 2))
    assert len(buffer) == 2 and not buffer.full
    buffer.push(rows(3, 4, 5, 6))
    assert buffer.full and buffer.take(range(3))["input_ids"].flatten().tolist() == [4, 5, 6]
    buffer.push(rows(7))
    assert buffer.take([0, 2, 2])["input_ids"].flatten().tolist() == [5, 7, 7]
    path = save_tree(tmp_path / "buffer.safetensors", buffer.state_dict())
    again = ReplayBuffer(3)
    again.load_state_dict(load_tree(path))
    again.push(rows(8))
    assert again.take(range(3))["input_ids"].flatten().tolist() == [6, 7, 8]
    empty = ReplayBuffer(0)
    empty.load_state_dict(empty.state_dict())
    empty.push(rows(1))
    assert len(empty) == 0
    with pytest.raises(DataError, match="nothing has been pushed"):
        empty.take([0])
    with pytest.raises(DataError, match="fields"):
        buffer.push({"other": torch.zeros(1)})
    with pytest.raises(ConfigError, match="capacity"):
        ReplayBuffer(-1)


def test_the_buffer_keeps_copies():
    batch, buffer = rows(1, 2), ReplayBuffer(2)
    buffer.push(batch)
    batch["input_ids"].zero_()
    assert buffer.take([0, 1])["input_ids"].flatten().tolist() == [1, 2]


def test_best_keeps_the_highest_and_restores_it():
    model, best = torch.nn.Linear(2, 1), Best()
    best.restore(model)
    for value, score in [(1.0, 0.3), (2.0, 0.9), (3.0, 0.9), (4.0, math.nan)]:
        torch.nn.init.constant_(model.weight, value)
        best.offer(score, model)
    again = Best()
    again.load_state_dict(best.state_dict())
    again.restore(model)
    assert again.score == 0.9 and model.weight.tolist() == [[2.0, 2.0]]


# ------------------------------------------------------------------ ROUGE-L


def test_rouge_l():
    assert rouge_l(["the cat sat"], ["the cat sat"]) == 1
    assert rouge_l(["a b c d"], ["a x c"], by_words=True) == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert rouge_l(["a b"], [["x y", "a b"]], by_words=True) == 1
    assert rouge_l_ids([[5, 6, 7], [1]], [[5, 7], [2]]) == pytest.approx((2 * (2 / 3) / (2 / 3 + 1)) / 2)
    with pytest.raises(DataError, match="1 predictions and 0 references"):
        rouge_l(["a"], [])


# ------------------------------------------------------------------ recipes


def inputs():
    torch.manual_seed(0)
    return {"student": language.llama(len(toy.VOCABULARY), 16, 1, 2, dropout=0.1), "data": toy.grammar("train", 20),
            "validation": toy.grammar("validation", 6), "config": FineTune(steps=4, batch=8, lr=1e-2, validate_every=2)}


def test_fine_tuning_keeps_the_contract():
    check_system(fine_tune, inputs)


def test_fine_tuning_learns_and_returns_the_best_checkpoint():
    data, run = toy.grammar("train", 64), Run(quiet=True)
    model = lm()
    before = language_loss(model, data)
    fine_tune(model, data, data, FineTune(30, 32, 1e-2, validate_every=5), run)
    losses = [line["validation"] for line in run.history if "validation" in line]
    assert language_loss(model, data) == pytest.approx(min(losses), abs=1e-5) and min(losses) < before - 1


def test_responses_without_targets_are_refused():
    data = toy.grammar("train", 8)
    with pytest.raises(DataError, match="no target"):
        fine_tune(lm(), data.with_fields(target_mask=torch.zeros_like(data.target_mask)), config=FineTune(1, 4))


def test_a_teachers_own_answers_as_training_set():
    teacher, data = lm(seed=3), toy.grammar("train", 20)
    answered = answered_by(teacher, data, 6, Run(quiet=True))
    assert len(answered) == 20 and answered.target_mask.sum(1).max() <= 6
    prompts = [left_padded_prompts(d.batch(range(20)), 0)[0] for d in (answered, data)]
    assert torch.equal(*prompts)
    assert 0 <= response_rouge(teacher, data, 6) <= 1
