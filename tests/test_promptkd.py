"""PromptKD, and the parts it brought: deep prompts, class vectors, prompt tuning, dual encoders of transformers."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from stillhouse.data.readers import read_data
from stillhouse.data.sets import TensorSet
from stillhouse.data.shapes import coloured_names, coloured_shapes
from stillhouse.errors import ConfigError, DamagedFileError, DataError, RoleError, UnknownNameError
from stillhouse.evaluate.base_novel import accuracy_among, base_and_novel, base_to_novel, harmonic_mean
from stillhouse.hub.dual_encoders import TextTower, VectorClassifier, adapt_dual, load_dual
from stillhouse.hub.models import resolve_model
from stillhouse.measures.divergences import kl
from stillhouse.models.dual_encoders import clip, siglip, word_tokenizer
from stillhouse.parts.class_vectors import class_vectors, cosine_logits, filled
from stillhouse.parts.heads import mlp
from stillhouse.parts.prompts import DeepPrompts, Prompted, appended, replaced
from stillhouse.protocols import ClassNames, DualEncoder, Images
from stillhouse.recipes import prompt_tuning
from stillhouse.recipes.prompt_tuning import gaussian_weights, tune
from stillhouse.recipes.views import resized_crop
from stillhouse.run import Run
from stillhouse.systems.compression import promptkd
from stillhouse.systems.compression.promptkd import Config, distance, distill
from stillhouse.testing import check_system

NAMES = ["red circle", "green square", "blue ring"]
TOKENIZER = word_tokenizer(["a photo of a {}.", *NAMES], length=12)


def dual(make=clip, seed=0, **options):
    torch.manual_seed(seed)
    small = {"width": 8, "layers": 3, "heads": 2, "patch": 4, "image": 8, "length": 12, **options}
    if make is clip:
        small = {"features": 6, "text_width": 8, "text_layers": 3, **small}
    else:
        small = {"text_layers": 3, **small}
    return adapt_dual(make(TOKENIZER, **small), TOKENIZER).eval()


def trained(**changes):
    return distill(**{**promptkd.tiny(), **changes}, run=Run(quiet=True))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------- deep prompts


def test_visual_prompts_stand_last_without_a_position_and_are_replaced_in_every_layer():
    d = dual()
    seen = []
    for layer in d.vision.layers:
        layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    before = hooks(d)
    prompts = DeepPrompts(2, 3, 8, std=1.0)()
    out = d.vision(torch.randn(2, 3, 8, 8), prompts)
    assert out.shape == (2, 6) and hooks(d) == before
    assert [h.shape[1] for h in seen] == [8, 8, 8]
    assert torch.allclose(seen[0][:, -3:], d.vision.model.pre_layrnorm(prompts[0]).expand(2, -1, -1), atol=1e-6)
    seen.clear()
    layer = d.vision.layers[1]
    inputs = []
    handle = layer.layer_norm1.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach()))
    d.vision(torch.randn(2, 3, 8, 8), prompts)
    handle.remove()
    assert torch.equal(inputs[0][:, -3:], prompts[1].detach().expand(2, -1, -1))


def test_prompts_of_depth_one_pass_through_the_layers_and_none_changes_nothing():
    d, x = dual(), torch.randn(2, 3, 8, 8)
    plain = d.vision(x)
    assert torch.equal(d.vision(x, DeepPrompts(0, 4, 8)()), plain)
    one, deep = DeepPrompts(1, 2, 8, 1.0)(), DeepPrompts(3, 2, 8, 1.0)()
    with torch.no_grad():
        deep[0].copy_(one[0])
    outputs = [plain, d.vision(x, one), d.vision(x, deep)]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(outputs) for b in outputs[:i])
    with torch.no_grad():
        moved = d.vision(x, one)[0] - d.vision(x, one.flip(1))[0]
    assert moved.abs().max() < 1e-5, "without positions the order of the prompts cannot matter"


def test_text_prompts_equal_to_the_words_they_replace_change_nothing():
    for make in (clip, siglip):
        d = dual(make)
        words = d.text.words("a photo of a")
        texts = filled("a photo of a {}.", NAMES)
        assert words.shape == (4, 8)
        shallow = DeepPrompts(1, 4, 8, first=words)
        assert torch.allclose(d.text(texts, shallow()), d.text(texts), atol=1e-6)
        deep = DeepPrompts(3, 4, 8, std=1.0, first=words)
        assert not torch.allclose(d.text(texts, deep()), d.text(texts), atol=1e-3)
        assert hooks(d) == 0


def test_text_prompts_stand_behind_the_beginning_of_sequence():
    d = dual()
    prompts = DeepPrompts(2, 4, 8, std=1.0)()
    seen = {}
    first = d.text.layers[0].register_forward_pre_hook(lambda m, args: seen.update(first=args[0].detach()))
    norm = d.text.layers[1].layer_norm1.register_forward_pre_hook(lambda m, args: seen.update(second=args[0].detach()))
    d.text(filled("a photo of a {}.", NAMES), prompts)
    first.remove(), norm.remove()
    positions = d.text.model.embeddings.position_embedding.weight
    assert torch.allclose(seen["first"][:, 1:5], (prompts[0] + positions[1:5]).expand(3, -1, -1), atol=1e-6)
    assert torch.equal(seen["second"][:, 1:5], prompts[1].detach().expand(3, -1, -1))
    assert not torch.equal(seen["second"][0, 5], seen["second"][1, 5])


def test_gradients_reach_every_layers_prompts_and_hooks_go_even_after_an_error():
    for make in (clip, siglip):
        d = dual(make).requires_grad_(False)
        visual, textual = DeepPrompts(3, 2, 8), DeepPrompts(3, 4, 8)
        (d.vision(torch.randn(2, 3, 8, 8), visual()).pow(2).sum() + d.text(["a photo of a red ring."], textual())
         .pow(2).sum()).backward()
        assert (visual.tokens.grad.flatten(1).norm(dim=1) > 0).all()
        assert (textual.tokens.grad.flatten(1).norm(dim=1) > 0).all()
        with pytest.raises(RoleError, match="prompts for 4 layers"):
            d.vision(torch.randn(2, 3, 8, 8), DeepPrompts(4, 2, 8)())
        with pytest.raises(RoleError, match="no room"):
            d.text(["red"], DeepPrompts(1, 12, 8)())
        assert hooks(d) == 0
    layers = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ZeroDivisionError), appended(DeepPrompts(2, 1, 4)(), layers), \
            replaced(DeepPrompts(1, 1, 4)(), layers, layers[0]):
        1 / 0  # noqa: B018
    assert hooks(layers) == 0
    with pytest.raises(ConfigError, match="depth"):
        DeepPrompts(-1, 2, 4)
    with pytest.raises(RoleError, match="first"):
        DeepPrompts(1, 2, 4, first=torch.zeros(3, 4))


def test_prompts_are_cut_off_before_a_pooling_over_all_tokens():
    d = dual(siglip)
    seen = {}
    handle = d.vision.model.head.register_forward_pre_hook(lambda m, args: seen.update(pooled=args[0].shape[1]))
    d.vision(torch.randn(1, 3, 8, 8), DeepPrompts(3, 5, 8)())
    handle.remove()
    assert seen["pooled"] == 4


# ---------------------------------------------------------------- class vectors, protocol of base and novel classes


def test_class_vectors_are_unit_means_over_templates():
    d = dual()
    templates = ("a photo of a {}.", "a {}.")
    W = class_vectors(d, NAMES, templates, batch=2)
    by_hand = sum(nn.functional.normalize(d.encode_text(filled(t, NAMES)), dim=-1) for t in templates)
    assert torch.allclose(W, nn.functional.normalize(by_hand, dim=-1), atol=1e-6)
    assert torch.allclose(W.norm(dim=1), torch.ones(3)) and not W.requires_grad
    assert filled("a {}.", ["great_white shark"]) == ["a great white shark."]
    with pytest.raises(ConfigError, match="template"):
        filled("a photo", NAMES)


def test_base_to_novel_scores_each_half_among_its_own_classes():
    assert base_and_novel(5) == ([0, 1, 2], [3, 4])
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3) and harmonic_mean(0.0, 0.0) == 0.0
    logits = torch.tensor([[1.0, 0, 5, 0], [0, 1, 5, 0], [9, 0, 1, 0], [9, 0, 1, 0]])
    labels = torch.tensor([0, 1, 2, 3])
    assert accuracy_among(logits, labels, [0, 1]) == 1.0 and accuracy_among(logits, labels, [2, 3]) == 0.5
    found = base_to_novel(nn.Identity(), TensorSet(image=logits, label=labels), [0, 1], [2, 3])
    assert found == {"base": 1.0, "novel": 0.5, "hm": pytest.approx(2 / 3), "all": 0.0}
    with pytest.raises(DataError, match="no sample"):
        accuracy_among(logits, labels, [7])


def test_each_half_of_the_embedded_classes_has_every_shape_and_colour_twice():
    names = coloured_names()
    assert len(set(names)) == 16
    for half in (names[:8], names[8:]):
        for words in zip(*(name.split() for name in half), strict=True):
            assert all(words.count(word) == 2 for word in words)
    assert coloured_shapes(64, background="plain", hue=0.0).label.bincount(minlength=16).tolist() == [4] * 16


# ---------------------------------------------------------------- stage 1


def test_gaussian_weights():
    w = gaussian_weights(20, 0.75, 0.05)
    by_hand = torch.exp(-0.5 * (torch.arange(1, 21).double() - 15) ** 2)
    assert torch.allclose(torch.tensor(w).double(), by_hand / by_hand.sum()) and sum(w) == pytest.approx(1)
    assert gaussian_weights(3, 0.75, 0.0) == [0, 0, 1] and gaussian_weights(0, 0.75, 0.05) == []


def test_the_terms_of_stage_1_have_the_released_reductions():
    torch.manual_seed(0)
    f, g, f0, g0 = (nn.functional.normalize(torch.randn(n, 6, dtype=torch.float64), dim=-1) for n in (5, 3, 5, 3))
    label, scale = torch.tensor([0, 1, 2, 0, 1]), torch.tensor(3.0, dtype=torch.float64)
    terms = prompt_tuning.losses(f, g, f0, g0, scale, label, prompt_tuning.Config())
    z, z0 = scale * f @ g.T, scale * f0 @ g0.T
    summed = nn.functional.kl_div(z.log_softmax(1), z0.log_softmax(1), reduction="sum", log_target=True)
    expected = {"ce": nn.functional.cross_entropy(z, label), "image": 10 * nn.functional.l1_loss(f, f0),
                "text": 25 * nn.functional.l1_loss(g, g0), "logits": summed / z.numel()}
    assert set(terms) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(terms[name], value), name


def test_the_tuned_prompts_are_the_average_over_the_epochs():
    data = TensorSet(image=torch.randn(4, 3, 8, 8), label=torch.tensor([0, 1, 0, 1]))
    config = prompt_tuning.Config(epochs=3, batch=2, depth=2, tokens=2, smallest=1.0, lr=0.1, average_width=0.4,
                                  warmup=0.0)
    kept = []

    class Watching(Run):
        def update(self, *args, **terms):
            super().update(*args, **terms)
            if self.last_of_epoch:
                kept.append([p.detach().clone() for group in args[0].param_groups for p in group["params"]])

    tuned = tune(dual(), data, NAMES, config, Watching(quiet=True))
    shares = gaussian_weights(3, 0.75, 0.4)
    for i, prompts in enumerate((tuned.visual, tuned.textual)):
        mean = sum(w * epoch[i] for w, epoch in zip(shares, kept, strict=True))
        assert torch.allclose(prompts.tokens, mean, atol=1e-6)
        assert not torch.allclose(prompts.tokens, kept[-1][i], atol=1e-4)


def test_tuning_changes_the_prompts_alone_and_knows_the_classes_that_have_labels():
    d = dual()
    before = state(d)
    label = torch.tensor([0, 2, 0, 2, 0, 2])
    data = TensorSet(image=torch.randn(6, 3, 8, 8) + (label - 1.0).view(-1, 1, 1, 1), label=label)
    config = prompt_tuning.Config(epochs=30, batch=6, depth=1, tokens=2, smallest=1.0, lr=0.003, optimizer="adamw",
                                  text_weight=0, image_weight=0, logit_weight=0, average_width=0.0, warmup=0.0)
    tuned = tune(d, data, NAMES, config, Run(quiet=True))
    assert same(d, before) and hooks(d) == 0 and all(p.requires_grad for p in d.parameters())
    W = class_vectors(tuned, NAMES, [tuned.template])
    with torch.no_grad():
        z = cosine_logits(tuned.encode_image(data.image), W[[0, 2]], d.scale)
        z0 = cosine_logits(d.encode_image(data.image), class_vectors(d, NAMES)[[0, 2]], d.scale)
    assert nn.functional.cross_entropy(z, label // 2) < nn.functional.cross_entropy(z0, label // 2) - 0.1


def test_the_regularisers_hold_the_features_near_the_frozen_ones():
    data = TensorSet(image=torch.randn(6, 3, 8, 8), label=torch.tensor([0, 1, 2, 0, 1, 2]))
    config = prompt_tuning.Config(epochs=20, batch=6, depth=3, tokens=2, smallest=1.0, lr=0.02, optimizer="adamw")
    moved = {}
    for name, weights in (("held", {}), ("free", {"text_weight": 0.0, "image_weight": 0.0, "logit_weight": 0.0})):
        d = dual()
        tuned = tune(d, data, NAMES, dataclasses.replace(config, **weights), Run(quiet=True))
        with torch.no_grad():
            f, f0 = (nn.functional.normalize(e.encode_image(data.image), dim=-1) for e in (tuned, d))
        W, W0 = class_vectors(tuned, NAMES, [tuned.template]), class_vectors(d, NAMES)
        moved[name] = ((f - f0).abs().mean() + (W - W0).abs().mean()).item()
    assert moved["held"] < 0.7 * moved["free"]


def test_a_random_crop_is_a_part_of_the_picture():
    run = Run(quiet=True).begin()
    x = torch.arange(8.0).expand(4, 1, 8, 8)
    out = resized_crop(x, run, 0.2)
    assert out.shape == x.shape and out.min() >= -1e-4 and out.max() <= 7 + 1e-4 and not torch.allclose(out, x)
    assert torch.allclose(resized_crop(torch.full((2, 1, 8, 8), 3.0), run), torch.tensor(3.0), atol=1e-4)
    with pytest.raises(ConfigError, match="smallest"):
        resized_crop(x, run, 0.0)


# ---------------------------------------------------------------- exact checks of stage 2


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient():
    d = dual().double()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    prompts = DeepPrompts(3, 2, 8).double()
    W = class_vectors(d, NAMES)
    expert = VectorClassifier(Prompted(d, prompts, DeepPrompts(0, 0, 8), "{}"), W, d.scale, NAMES)
    own = copy.deepcopy(prompts)
    student = VectorClassifier(d.vision, W, d.scale, NAMES, own, nn.Identity())
    loss = distance(expert(x).detach(), student(x), Config())
    loss.backward()
    assert loss.abs() < 1e-10 and own.tokens.grad.abs().max() < 1e-10
    changed = VectorClassifier(d.vision, W, d.scale * 2, NAMES, own, nn.Identity())
    assert distance(expert(x).detach(), changed(x), Config()) > 1e-6


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_the_gradient_in_the_logits(tau):
    torch.manual_seed(0)
    z_T = torch.randn(4, 7, dtype=torch.float64)
    z_S = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    config = Config(weight=1000.0, temperature=tau)
    distance(z_T, z_S, config).backward()
    expected = 1000 * tau * ((z_S / tau).softmax(1) - (z_T / tau).softmax(1)) / (4 * 7)
    assert torch.allclose(z_S.grad, expected.detach(), atol=1e-6, rtol=0)
    assert torch.allclose(distance(z_T, z_S, config), 1000 / 7 * kl(z_T, z_S, tau))


def test_only_prompts_and_projector_learn_and_the_students_texts_are_never_read(monkeypatch):
    given = promptkd.tiny()
    given["config"] = dataclasses.replace(given["config"], tuning=prompt_tuning.Config(epochs=0), epochs=1, batch=16)
    read = {"teacher": 0, "student": 0}
    forward = TextTower.forward

    def counting(self, texts, prompts=None):
        read["teacher" if self is given["teacher"].text else "student"] += len(texts)
        return forward(self, texts, prompts)

    monkeypatch.setattr(TextTower, "forward", counting)
    before = state(given["student"]), state(given["teacher"])
    torch.manual_seed(0)
    target = distill(**given, run=Run(quiet=True))
    assert same(given["student"], before[0]) and same(given["teacher"], before[1])
    assert same(target.vision, {n.removeprefix("vision."): v for n, v in before[0].items()})
    target(given["unlabelled"].image)
    assert read == {"teacher": len(given["classes"]), "student": 0}
    assert not any(isinstance(m, TextTower) for m in target.modules())


def test_prompts_and_projector_do_learn():
    config = promptkd.tiny()["config"]
    none, some = (trained(config=dataclasses.replace(config, epochs=n, lr=0.1)) for n in (0, 2))
    assert torch.equal(none.W, some.W)
    for part in ("prompts", "projector"):
        pairs = zip(getattr(none, part).parameters(), getattr(some, part).parameters(), strict=True)
        assert all(not torch.equal(a, b) for a, b in pairs), part


def test_the_order_of_the_classes_does_not_matter():
    d, x = dual(seed=1), torch.randn(4, 3, 8, 8)
    teacher, order = dual(features=5), torch.tensor([2, 0, 1])
    W = class_vectors(teacher, NAMES)
    prompts, h = DeepPrompts(2, 2, 8), mlp(6, 5, 5, norm=True)
    z_T = cosine_logits(teacher.encode_image(x), W, teacher.scale)
    z_S, permuted = (VectorClassifier(d.vision, w, d.scale, NAMES, prompts, h)(x) for w in (W, W[order]))
    assert torch.allclose(z_S[:, order], permuted, atol=1e-5)
    config = Config()
    assert torch.allclose(distance(z_T, z_S, config), distance(z_T[:, order], permuted, config), atol=1e-4)


def test_the_student_learns_what_the_teacher_says():
    given = promptkd.tiny()
    config = dataclasses.replace(given["config"], tuning=prompt_tuning.Config(epochs=0), lr=0.02, optimizer="adamw",
                                 warmup=0.0, smallest=1.0)
    data = given["unlabelled"]

    def gap(epochs, **changes):
        target = trained(config=dataclasses.replace(config, epochs=epochs, **changes))
        with torch.no_grad():
            u = given["teacher"].encode_image(data.image)
            return kl(cosine_logits(u, target.W, given["teacher"].scale), target(data.image)).item()

    start = gap(0)
    assert gap(60) < 0.3 * start and gap(60, target="hard") > gap(60)


def test_both_stages_in_one_are_the_two_after_one_another():
    given = promptkd.tiny()
    together = distill(**given, run=Run(quiet=True))
    run = Run(quiet=True).begin()
    with run.scope("teacher"):
        tuned = tune(given["teacher"], given["labelled"], list(given["classes"].name), given["config"].tuning, run)
    settled = dataclasses.replace(given["config"], tuning=dataclasses.replace(given["config"].tuning, epochs=0))
    apart = distill(**{**given, "teacher": tuned, "labelled": None, "config": settled}, run=Run(quiet=True))
    assert torch.equal(together.W, apart.W)
    assert together(given["unlabelled"].image).shape == (16, 4)


def test_stored_logits_of_the_teacher_are_those_it_would_give(monkeypatch):
    given = promptkd.tiny()
    config = dataclasses.replace(given["config"], smallest=1.0, tuning=prompt_tuning.Config(epochs=0))
    seen = []
    monkeypatch.setattr(promptkd, "distance", lambda z_T, z_S, c: seen.append(z_T) or distance(z_T, z_S, c))
    target = trained(config=config)
    with torch.no_grad():
        z = cosine_logits(given["teacher"].encode_image(given["unlabelled"].image), target.W, given["teacher"].scale)
    assert len(seen) == 4 and all((row - z).abs().amax(1).min() < 1e-4 for batch in seen for row in batch)


def test_the_students_own_text_encoder_is_used_where_asked():
    given = promptkd.tiny()
    config = dataclasses.replace(given["config"], vectors="student")
    target = trained(config=config)
    assert target.projector is None
    W = class_vectors(given["student"], given["classes"].name, config.tuning.templates)
    assert torch.allclose(target.W, W, atol=1e-6)


# ---------------------------------------------------------------- the target, contract, errors


def test_the_target_is_saved_and_loaded(tmp_path):
    target = trained()
    target.save(tmp_path)
    again = VectorClassifier.load(tmp_path)
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(target(x), again(x)) and again.names == target.names
    (tmp_path / "classifier.json").write_text((tmp_path / "classifier.json").read_text().replace('"names"', '"n"'))
    with pytest.raises(DamagedFileError, match="classifier"):
        VectorClassifier.load(tmp_path)
    own = VectorClassifier(nn.Flatten(), torch.eye(12)[:2], torch.tensor(1.0), ["a", "b"])
    own.save(tmp_path / "own")
    with pytest.raises(RoleError, match="vision"):
        VectorClassifier.load(tmp_path / "own")
    assert torch.equal(VectorClassifier.load(tmp_path / "own", nn.Flatten())(x[:, :, :2, :2]), own(x[:, :, :2, :2]))


def test_the_contract():
    check_system(distill, promptkd.tiny)


def test_wrong_input_is_named_before_any_step():
    given = promptkd.tiny()
    for wrong, match in (({"target": "firm"}, "target"), ({"vectors": "both"}, "vectors"), ({"tokens": 0}, "tokens"),
                         ({"temperature": 0.0}, "temperature"), ({"smallest": 0.0}, "smallest"),
                         ({"weight": 0.0}, "weight"), ({"vectors": "student", "depth": 0}, "nothing")):
        with pytest.raises(ConfigError, match=match):
            Config(**wrong)
    for wrong, match in (({"depth": 0}, "depth"), ({"context": " "}, "context"), ({"templates": ("a",)}, "template"),
                         ({"average_at": 0.0}, "average"), ({"image_weight": -1.0}, "weights")):
        with pytest.raises(ConfigError, match=match):
            prompt_tuning.Config(**wrong)
    with pytest.raises(DataError, match="give labelled"):
        trained(labelled=None)
    with pytest.raises(DataError, match="different names"):
        trained(classes=TensorSet(name=["a", "a"]))
    with pytest.raises(DataError, match="2 classes have names"):
        trained(classes=TensorSet(name=["red", "white"]),
                labelled=given["labelled"].with_fields(label=torch.arange(6) % 3))
    with pytest.raises(DataError, match="at least two"):
        trained(labelled=given["labelled"].with_fields(label=torch.zeros(6, dtype=torch.long)))
    with pytest.raises(RoleError, match="student"):
        trained(student=nn.Flatten())
    tuned = prompt_tuning.fresh(given["teacher"], given["config"].tuning)
    with pytest.raises(RoleError, match="epochs 0"):
        trained(teacher=tuned)


# ---------------------------------------------------------------- real classes, reading


@pytest.mark.parametrize("make", [clip, siglip])
def test_it_runs_on_saved_dual_encoders_of_transformers(tmp_path, make):
    names, given = ["red circle", "green square", "blue ring"], promptkd.tiny()
    for role, seed in (("teacher", 0), ("student", 1)):
        torch.manual_seed(seed)
        make(TOKENIZER, width=8, layers=2, heads=2, patch=4, image=8, text_layers=1, length=12,
             **({"text_width": 8} if make is clip else {})).save_pretrained(tmp_path / role)
        TOKENIZER.save_pretrained(tmp_path / role)
    teacher, student = (resolve_model(f"hf:{tmp_path / role}", DualEncoder) for role in ("teacher", "student"))
    assert teacher.text.start == 1 and teacher.encode_text(["a red circle."]).dim() == 2
    before = state(student), state(teacher)
    target = distill(teacher, student, given["unlabelled"], TensorSet(name=names),
                     given["labelled"].with_fields(label=torch.arange(6) % 2), given["config"], Run(quiet=True))
    assert same(student, before[0]) and same(teacher, before[1])
    assert target(torch.randn(2, 3, 10, 12)).shape == (2, 3)
    target.save(tmp_path / "target")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(VectorClassifier.load(tmp_path / "target")(x), target(x))


def test_the_adapter_gives_what_transformers_gives():
    torch.manual_seed(0)
    for make in (clip, siglip):
        model = make(TOKENIZER, width=8, layers=2, heads=2, patch=4, image=8, length=12).eval()
        d = adapt_dual(model, TOKENIZER)
        x = torch.randn(2, 3, 8, 8)
        ids = d.text.tokens(filled("a photo of a {}.", NAMES))
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=x)
            image, text = (nn.functional.normalize(v, dim=-1) for v in (d.encode_image(x), d.encode_text(
                filled("a photo of a {}.", NAMES))))
        assert torch.allclose(image, out.image_embeds, atol=1e-5) and torch.allclose(text, out.text_embeds, atol=1e-5)
        bias = model.logit_bias if make is siglip else 0.0
        assert torch.allclose(d.scale * image @ text.T + bias, out.logits_per_image, atol=1e-4)


def test_what_is_no_dual_encoder_is_refused(tmp_path):
    import transformers

    with pytest.raises(RoleError, match="no CLIP or SigLIP"):
        adapt_dual(nn.Linear(2, 2), TOKENIZER)
    transformers.ViTConfig(hidden_size=8).save_pretrained(tmp_path / "vit")
    with pytest.raises(RoleError, match="vit"):
        load_dual(str(tmp_path / "vit"))
    with pytest.raises(RoleError, match="encode_text"):
        resolve_model("tiny-convnet", DualEncoder)
    with pytest.raises(UnknownNameError, match="no folder"):
        load_dual("./nothing-here")


def test_class_names_are_read(tmp_path):
    (tmp_path / "names.txt").write_text("red circle\n\n blue ring \n", encoding="utf-8")
    assert read_data(tmp_path / "names.txt", ClassNames).name == ["red circle", "blue ring"]
    (tmp_path / "none.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="no class names"):
        read_data(tmp_path / "none.txt", ClassNames)
    from PIL import Image

    for name in ("great_auk", "moa"):
        (tmp_path / "birds" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "birds" / name / "a.png")
    assert read_data(tmp_path / "birds", ClassNames).name == ["great auk", "moa"]
    assert read_data("coloured-shape-names", ClassNames).name == coloured_names()
    assert int(read_data("coloured-shapes:n=32,background=plain,base=true", Images).label.max()) == 7
    with pytest.raises(DataError, match="name"):
        read_data("digits", ClassNames)
