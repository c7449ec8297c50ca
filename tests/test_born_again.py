"""Born-again networks: the exact checks of the losses, the chain of generations, real models."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stillhouse
from stillhouse.cli import main
from stillhouse.data.digits import digits
from stillhouse.data.grammar import VOCABULARY, grammar
from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DamagedFileError, DataError, RoleError
from stillhouse.evaluate.text import language_loss, response_rouge
from stillhouse.hub.models import resolve_model
from stillhouse.measures.classes import confidence_weighted, confidence_weights, permuted_target
from stillhouse.measures.divergences import signed_cross_entropy, soft_cross_entropy
from stillhouse.models.convnets import TinyConvNet
from stillhouse.models.recurrent import LSTMLanguageModel
from stillhouse.parts.ensembles import Ensemble
from stillhouse.protocols import Network
from stillhouse.recipes.generations import Config as Training
from stillhouse.recipes.generations import generations, same_size, taught
from stillhouse.run import Run, fingerprint
from stillhouse.systems.compression import born_again
from stillhouse.systems.compression.born_again import Config, distill, picture_terms, token_terms
from stillhouse.testing import check_system

SHORT = Config(steps=6, batch=8, optimizer="adamw", lr=0.01)


def logits(n=9, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(n, classes, dtype=torch.float64, generator=generator) for _ in range(2)]


def pictures(n=24, classes=4):
    torch.manual_seed(1)
    return TensorSet(image=torch.rand(n, 1, 8, 8), label=torch.arange(n) % classes)


def small():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))


# ------------------------------------------------------------------------------------------ losses


def test_the_gradient_of_ban_in_the_logits_is_q_minus_p():
    p, z = logits()
    z.requires_grad_()
    soft_cross_entropy(p, z, reduction="sum").backward()
    torch.testing.assert_close(z.grad, z.detach().softmax(1) - p.softmax(1), rtol=0, atol=1e-14)
    assert z.grad.sum(1).abs().max() < 1e-14


def test_the_weights_of_cwtm_add_up_to_1_and_are_even_for_even_confidence():
    p, z = logits()
    label = torch.arange(len(p)) % p.shape[1]
    w = confidence_weights(p)
    torch.testing.assert_close(w.sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(w, p.softmax(1).amax(1) / p.softmax(1).amax(1).sum())
    total, weight = confidence_weighted(p, z, label)
    torch.testing.assert_close(total / weight, (w * F.cross_entropy(z, label, reduction="none")).sum())
    even = torch.stack([row[torch.randperm(5)] for row in p[:1].expand(9, -1)])
    total, weight = confidence_weighted(even, z, label)
    torch.testing.assert_close(total / weight, F.cross_entropy(z, label))


def test_dkpp_keeps_the_likeliest_class_the_values_and_their_sum():
    p, _ = logits(200)
    u = torch.rand(200, 4)
    before, after = p.log_softmax(1).exp(), permuted_target(p, u)
    torch.testing.assert_close(after.argmax(1), before.argmax(1))
    torch.testing.assert_close(after.amax(1), before.amax(1), rtol=0, atol=0)
    torch.testing.assert_close(after.sort(1).values, before.sort(1).values, rtol=0, atol=0)
    assert ((after - before).abs().amax(1) > 0).float().mean() > 0.8
    counts = torch.zeros(5, 5)
    one = torch.tensor([[5.0, 0.0, 1.0, 2.0, 3.0]]).expand(6000, -1)
    shown = permuted_target(one, torch.rand(6000, 4))
    for c in range(5):
        counts[:, c] = (shown - one.softmax(1)[:, c : c + 1]).abs().lt(1e-7).float().mean(0)
    torch.testing.assert_close(counts[1:, 1:], torch.full((4, 4), 0.25), rtol=0, atol=0.03)
    with pytest.raises(DataError, match="a number for every class but one"):
        permuted_target(p, torch.rand(200, 5))


def test_dkpp_of_two_classes_is_ban():
    p, z = logits(classes=2)
    target = permuted_target(p, torch.rand(len(p), 1))
    torch.testing.assert_close(target, p.log_softmax(1).exp(), rtol=0, atol=0)
    torch.testing.assert_close(signed_cross_entropy(target, z), soft_cross_entropy(p, z))


def test_with_a_saturated_teacher_that_is_right_ban_dkpp_cwtm_and_ce_are_one():
    _, z = logits()
    label = torch.arange(len(z)) % z.shape[1]
    p = 1e4 * F.one_hot(label, z.shape[1]).double()
    run, batch = Run(quiet=True), {"label": label}
    wanted = F.cross_entropy(z, label)
    for treatment in ("ban", "cwtm", "dkpp"):
        terms = picture_terms(dataclasses.replace(SHORT, treatment=treatment), run)
        torch.testing.assert_close(terms(p, z, batch)[treatment], wanted)
    both = picture_terms(dataclasses.replace(SHORT, labels=0.5), run)(p, z, batch)
    torch.testing.assert_close(both["ce"], 0.5 * wanted)
    assert set(picture_terms(SHORT, run)(None, z, batch)) == {"ce"}


# ------------------------------------------------------------------------------------------ generations


def test_children_have_the_size_of_their_parent_new_weights_and_leave_it_as_it_was():
    started, made = [], []

    def network():
        made.append(small())
        return made[-1]

    def lesson(child, before, k):
        started.append(copy.deepcopy(child.state_dict()))
        was = None if before is None else fingerprint(before)
        taught(child, before, pictures(), lambda p, z, batch: {"ce": soft_cross_entropy(z if p is None else p, z)},
               Training(steps=3, batch=8), run)
        assert before is None or fingerprint(before) == was
        return child

    run = Run(quiet=True)
    chain = generations(network, lesson, 2, run)
    assert len(chain) == 3 and same_size(chain) and all(a is b for a, b in zip(chain, made, strict=True))
    assert not torch.equal(started[0]["0.weight"], started[1]["0.weight"])
    assert not torch.equal(started[1]["0.weight"], started[2]["0.weight"])
    with pytest.raises(RoleError, match="same module every time"):
        generations(lambda: made[0], lesson, 1, Run(quiet=True))


def test_generations_have_the_same_weights_and_order_whatever_the_teacher_is():
    first = distill(small, pictures(), config=dataclasses.replace(SHORT, generations=0, steps=2), run=Run(quiet=True))
    whole = distill(small, pictures(), config=dataclasses.replace(SHORT, generations=1, steps=4), run=Run(quiet=True))
    after = distill(small, pictures(), teacher=first, config=dataclasses.replace(SHORT, generations=1, steps=2),
                    run=Run(quiet=True))
    assert fingerprint(whole) == fingerprint(after) != fingerprint(first)


def test_steps_are_shared_out_among_all_that_is_trained():
    for teacher, counts in ((None, [2, 2, 3]), (small(), [3, 4])):
        run = Run(quiet=True)
        distill(small, pictures(), teacher=teacher, config=dataclasses.replace(SHORT, steps=7, generations=2), run=run)
        stages = [line["stage"] for line in run.history]
        assert [stages.count(s) for s in dict.fromkeys(stages)] == counts


def test_ban_never_reads_the_labels_and_the_control_never_hears_the_teacher():
    data, teacher = pictures(), small()
    other = data.with_fields(label=(data.label + 1) % 4)
    made = {name: [distill(small, d, teacher=t, config=dataclasses.replace(SHORT, treatment=name), run=Run(quiet=True))
                   for d, t in ((data, teacher), (other, teacher), (data, small()))]
            for name in ("ban", "dkpp", "cwtm", "labels")}
    same = {name: [fingerprint(a) == fingerprint(models[0]) for a in models[1:]] for name, models in made.items()}
    assert same == {"ban": [True, False], "dkpp": [True, False], "cwtm": [False, False], "labels": [False, True]}


def test_the_result_is_the_last_child_or_all_of_them(tmp_path):
    config = dataclasses.replace(SHORT, generations=2)
    last = distill(small, pictures(), config=config, run=Run(quiet=True))
    whole = distill(small, pictures(), config=dataclasses.replace(config, result="ensemble"), run=Run(quiet=True))
    assert isinstance(whole, Ensemble) and fingerprint(whole.members[1]) == fingerprint(last)
    x = torch.rand(3, 1, 8, 8)
    mean = torch.stack([member(x).softmax(1) for member in whole.members]).mean(0)
    torch.testing.assert_close(whole(x).softmax(1), mean)
    loaded = Ensemble.load(whole.save(tmp_path / "e"), small)
    torch.testing.assert_close(loaded(x), whole(x), rtol=0, atol=0)
    with pytest.raises(RoleError, match="2 networks of this architecture"):
        Ensemble.load(tmp_path / "e", TinyConvNet)
    (tmp_path / "e" / "ensemble.json").write_text("[]")
    with pytest.raises(DamagedFileError):
        Ensemble.load(tmp_path / "e", small)


def test_what_does_not_fit_is_refused_before_any_work():
    texts, data = grammar("train", 8), pictures()
    wrong = [
        ({}, DataError, "not none"),
        ({"labelled": data, "corpus": texts}, DataError, "not both"),
        ({"labelled": data.without("label")}, DataError, "label"),
        ({"labelled": data, "teacher": nn.Sequential(nn.Flatten(), nn.Linear(64, 3))}, RoleError, "classes"),
        ({"labelled": data, "config": Config(generations=0, result="ensemble")}, ConfigError, "without children"),
        ({"corpus": texts, "network": lstm, "config": Config(treatment="dkpp")}, ConfigError, "language models"),
        ({"corpus": texts.with_fields(target_mask=torch.zeros_like(texts.target_mask)), "network": lstm}, DataError,
         "nothing"),
    ]
    for given, error, words in wrong:
        run = Run(quiet=True)
        with pytest.raises(error, match=words):
            distill(**{"network": small, "run": run, **given})
        assert not run.begun
    for field, value in (("treatment", "x"), ("result", "x"), ("schedule", "x"), ("generations", -1), ("labels", -1),
                         ("smoothing", 1.0), ("clip", 0.0), ("view", -1)):
        with pytest.raises(ConfigError):
            Config(**{field: value})


# ------------------------------------------------------------------------------------------ language models


def lstm(width=16):
    return LSTMLanguageModel(len(VOCABULARY), width=width)


def test_language_models_are_born_again_on_the_tokens_to_be_predicted():
    texts, run = grammar("train", 24), Run(quiet=True)
    parent = lstm()
    was = fingerprint(parent)
    before = language_loss(child := distill(lstm, corpus=texts, teacher=parent, run=run, config=dataclasses.replace(
        SHORT, generations=1, labels=1.0, steps=30)), texts)
    assert fingerprint(parent) == was and before < language_loss(lstm(), texts)
    assert {"ban", "ce"} <= set(run.history[0])
    assert same_size([parent, child])


def test_language_models_keep_the_contract():
    def inputs():
        torch.manual_seed(0)
        return {"network": lambda: lstm(4), "corpus": grammar("train", 6), "teacher": lstm(4),
                "config": dataclasses.replace(SHORT, generations=2, labels=1.0, steps=4, batch=4, clip=1.0)}

    check_system(distill, inputs)


def test_the_loss_of_language_models_has_the_gradient_of_the_cross_entropy_with_the_teacher():
    torch.manual_seed(0)
    from stillhouse.measures.language import Logits

    p, z = (torch.randn(2, 4, 6, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]])
    z.requires_grad_()
    terms = token_terms(SHORT, Run(quiet=True))(Logits(p), Logits(z), {"target_mask": mask})
    terms["ban"].backward()
    where = mask[:, 1:].bool()
    wanted = torch.zeros_like(z)
    wanted[:, :-1][where] = (z.softmax(-1) - p.softmax(-1))[:, :-1][where] / 4
    torch.testing.assert_close(z.grad, wanted, rtol=0, atol=1e-12)


def test_a_recurrent_model_continues_left_padded_prompts_as_it_does_bare_ones():
    torch.manual_seed(0)
    model = lstm().eval()
    assert model.head.weight is model.embed.weight
    bare = torch.tensor([[1, 5, 9, 2]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), bare], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    said = model.generate(bare, max_new_tokens=6)
    torch.testing.assert_close(model.generate(padded, mask, max_new_tokens=6)[:, 3:], said)
    with torch.no_grad():
        assert said[0, 4] == model(bare).logits[0, -1].argmax()
        assert model.generate(bare, max_new_tokens=4, eos_token_id=int(said[0, 4])).shape[1] == 5
    assert 0 <= response_rouge(model, grammar("test", 4), 5) <= 1


def test_gpt2_from_a_folder_is_born_again_and_loaded_back(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    from stillhouse.models.dual_encoders import word_tokenizer

    tokenizer = word_tokenizer(["red circle", "green square"], length=12)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    pair = {"prompt": "red circle", "response": "green square"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for _ in range(4)))
    monkeypatch.chdir(tmp_path)
    main(["run", "born-again", "--network", "hf:gpt2", "--teacher", "hf:gpt2", "--corpus", "pairs.jsonl", "--quiet",
          "--config.steps", "2", "--config.batch", "2", "--config.generations", "1", "--config.labels", "1", "--out",
          "done"])
    assert "stillhouse.load('done')" in capsys.readouterr().out
    loaded = stillhouse.load("done")
    assert type(loaded).__name__ == "GPT2LMHeadModel" and not loaded.training
    assert loaded.generate(torch.arange(4)[None], max_new_tokens=3).shape[1] > 4
    assert (tmp_path / "done" / "target" / "tokenizer").is_dir()


# ------------------------------------------------------------------------------------------ classifiers of libraries


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_classifiers_of_transformers_are_born_again_from_a_folder(name, tmp_path):
    hf = pytest.importorskip("transformers")
    model = {"vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8,
        num_channels=1, num_labels=10)),
        "resnet": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=10))}
    model[name]().save_pretrained(tmp_path / name)
    network = resolve_model(f"hf:{tmp_path / name}", Network)
    teacher = TinyConvNet()
    data = digits(16, "labelled").select(range(12))
    made = distill(network, data, teacher=teacher, run=Run(quiet=True), config=dataclasses.replace(
        SHORT, steps=2, generations=2, result="ensemble", labels=1.0))
    assert same_size([*made.members, network()]) and made(data.image).shape == (12, 10)


def test_an_ensemble_can_be_a_teacher_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["run", "born-again", "--network", "tiny-convnet:width=2", "--labelled", "digits16:labelled", "--quiet",
          "--config.steps", "2", "--config.batch", "8", "--config.generations", "1", "--config.result", "ensemble",
          "--out", "first"])
    main(["run", "born-again", "--network", "tiny-convnet:width=2", "--labelled", "digits16:labelled", "--quiet",
          "--teacher", "first", "--config.steps", "1", "--config.batch", "8", "--config.generations", "1", "--out",
          "second"])
    assert isinstance(resolve_model("first"), Ensemble) and isinstance(stillhouse.load("second"), TinyConvNet)


def test_the_experiment_trains_every_generation_alike():
    assert born_again.EMBEDDED.steps % (born_again.EMBEDDED.generations + 1) == 0
    assert born_again.EMBEDDED.clip == math.inf and born_again.LANGUAGE.generations == 1
