import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stillhouse
from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.evaluate.size import model_size
from stillhouse.measures.divergences import kl
from stillhouse.parts.packed import QuantizedModel
from stillhouse.parts.quantizers import Codebook, allocate_points, encode, quantize, to_buckets
from stillhouse.run import Run
from stillhouse.systems.compression import quantized_distillation as system
from stillhouse.systems.compression.quantized_distillation import Config, distill, losses, phases
from stillhouse.testing import check_system

PLAIN = Config(steps=1, batch=16, bits=2, bucket=16, lr=0.1, weight_decay=0, allocate=False, points_lr=1e-3)


def trained(config=PLAIN, run=None, **changes):
    given = {**system.tiny(), "config": config, **changes}
    return distill(**given, run=run or Run(quiet=True))


def learned(config=PLAIN, **changes):
    return trained(dataclasses.replace(config, points=1.0), teacher=None, **changes)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def with_norm():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


class Recorder(nn.Module):
    """Keeps the weight of the first layer at every training forward pass, and the mode."""

    def __init__(self, model):
        super().__init__()
        self.model, self.weights = model, []

    def forward(self, image):
        if self.training:
            self.weights.append(next(self.model.parameters()).detach().clone())
        return self.model(image)


# ---------------------------------------------------------------- the loss


def test_the_loss_is_hintons():
    g = torch.Generator().manual_seed(0)
    z_t, z_s = torch.randn(2, 5, 4, dtype=torch.float64, generator=g)
    batch = {"image": torch.zeros(5, 1), "label": torch.arange(5) % 4}
    config, run = Config(rho=0.7, temperature=2.0), Run(quiet=True)
    terms = losses(lambda x: z_t, batch, z_s, config, run)
    p, log_q = (z_t / 2).softmax(1), (z_s / 2).log_softmax(1)
    assert terms["kd"].item() == pytest.approx(0.7 * 4 * (p * (p.log() - log_q)).sum(1).mean().item(), abs=1e-12)
    assert terms["ce"].item() == pytest.approx(0.3 * F.cross_entropy(z_s, batch["label"]).item(), abs=1e-12)
    element = losses(lambda x: z_t, batch, z_s, dataclasses.replace(config, reduction="element"), run)
    old = F.kl_div(log_q, p, reduction="none").mean()
    assert element["kd"].item() == pytest.approx(0.7 * 4 * old.item(), abs=1e-12)
    assert terms["kd"].item() == pytest.approx(4 * element["kd"].item(), abs=1e-12)
    assert set(losses(None, batch, z_s, dataclasses.replace(config, rho=0.0), run)) == {"ce"}
    assert set(losses(lambda x: z_t, batch, z_s, dataclasses.replace(config, rho=1.0), run)) == {"kd"}


def test_labels_may_be_one_for_each_position_and_some_do_not_count():
    g = torch.Generator().manual_seed(0)
    z_t, z_s = torch.randn(2, 3, 6, 4, dtype=torch.float64, generator=g)
    label = torch.arange(18).view(3, 6) % 4
    label[0, 2:] = -100
    terms = losses(lambda x: z_t, {"image": torch.zeros(3, 1), "label": label}, z_s, Config(rho=0.5), Run(quiet=True))
    some = label != -100
    assert terms["ce"].item() == pytest.approx(0.5 * F.cross_entropy(z_s[some], label[some]).item(), abs=1e-12)
    assert terms["kd"].item() == pytest.approx(0.5 * kl(z_t[some], z_s[some], 2.0).item(), abs=1e-12)


# ---------------------------------------------------------------- quantized distillation


def test_a_step_moves_the_shadow_weights_by_the_gradient_at_the_quantised_ones():
    given = system.tiny()
    start = copy.deepcopy(given["student"])
    at = copy.deepcopy(start)
    with torch.no_grad():
        for p in at.parameters():
            p.copy_(quantize(p, 4, 16))
    image, label = given["labelled"].image, given["labelled"].label
    loss = 0.7 * kl(given["teacher"](image), at(image), 2.0) + 0.3 * F.cross_entropy(at(image), label)
    loss.backward()
    expected = {n: encode(w.detach() - 0.1 * 1.9 * g.grad, 4, 16).decode()
                for (n, w), g in zip(start.named_parameters(), at.parameters(), strict=True)}
    target = trained()
    for name, p in target.model.named_parameters():
        assert torch.allclose(p, expected[name], atol=1e-6), name


def test_every_bucket_of_every_tensor_has_at_most_s_values_in_training_and_after():
    recorder = Recorder(system.tiny()["student"])
    target = trained(dataclasses.replace(PLAIN, steps=5), student=recorder)
    assert target.model is recorder and len(recorder.weights) == 5
    for w in [*recorder.weights, *target.model.parameters()]:
        assert all(len(bucket.unique()) <= 4 for bucket in to_buckets(w, 16))
    full = {n: c.decode() for n, c in target.codes.items()}
    assert all(torch.equal(p, full[n]) for n, p in target.model.named_parameters())
    assert not torch.equal(recorder.weights[0], recorder.weights[4])


def test_without_steps_it_is_post_mortem_quantisation():
    start = system.tiny()["student"]
    target = trained(dataclasses.replace(PLAIN, steps=0))
    for before, after in zip(start.parameters(), target.model.parameters(), strict=True):
        assert torch.equal(after, quantize(before, 4, 16))
    unbucketed = trained(dataclasses.replace(PLAIN, steps=0, bucket=None)).model
    assert not same(unbucketed, target.model) and all(len(p.unique()) <= 4 for p in unbucketed.parameters())


def test_at_16_bits_it_is_the_full_precision_student():
    x = system.tiny()["labelled"].image
    y = system.tiny()["labelled"].label
    full = trained(dataclasses.replace(PLAIN, steps=20, tensors="none"))
    fine = trained(dataclasses.replace(PLAIN, steps=20, bits=16))
    assert full.codes == {} and len(fine.codes) == 4
    assert abs(F.cross_entropy(full(x), y) - F.cross_entropy(fine(x), y)) < 1e-3
    points = learned(dataclasses.replace(PLAIN, steps=0, bits=16), student=copy.deepcopy(full.model))
    assert abs(F.cross_entropy(full(x), y) - F.cross_entropy(points(x), y)) < 1e-3


def test_the_teacher_is_approached():
    given = system.tiny()
    x = given["labelled"].image
    target = trained(dataclasses.replace(PLAIN, steps=200, rho=1.0, bits=4))
    assert kl(given["teacher"](x), target(x)) < 0.3 * kl(given["teacher"](x), given["student"](x))


def test_each_option_of_the_quantiser_changes_the_training():
    config = dataclasses.replace(PLAIN, steps=6)
    base = trained(config).model
    assert same(base, trained(config).model)
    wide = system.tiny()["student"]
    with torch.no_grad():
        wide[1].weight *= 10
    for changes in ({"rounding": "stochastic"}, {"gradient": "complicated"}, {"rho": 0.0}, {"reduction": "element"}):
        other = dataclasses.replace(config, **changes)
        assert not same(base, trained(other).model), changes
        assert same(trained(other).model, trained(other).model), changes
    cut = trained(dataclasses.replace(config, gradient="truncated"), student=copy.deepcopy(wide)).model
    assert cut[1].weight.abs().max() <= 1 < trained(config, student=wide).model[1].weight.abs().max()


def test_what_is_kept_stays_in_full_precision_and_is_trained():
    config = dataclasses.replace(PLAIN, steps=3)
    start = with_norm()
    for changes, coded in (({"tensors": "weights"}, {"0.weight", "4.weight"}),
                           ({"spare_ends": True}, {"1.weight", "1.bias"}),
                           ({"keep": ("4.*", "*.bias")}, {"0.weight", "1.weight"})):
        target = trained(dataclasses.replace(config, **changes), student=with_norm())
        assert set(target.codes) == coded
        assert not torch.equal(target.model[4].bias, start[4].bias)
        assert len(target.model[4].bias.unique()) == 4 and len(target.rest()) == 9 - len(coded)


def test_batch_statistics_are_those_at_the_quantised_weights():
    config = dataclasses.replace(PLAIN, steps=1, lr=1e-9)
    net = trained(config, student=with_norm()).model
    reference = QuantizedModel(with_norm(), {n: encode(p, 4, 16) for n, p in with_norm().named_parameters()}).model
    reference.train()(system.tiny()["labelled"].image)
    assert torch.allclose(net[1].running_mean, reference[1].running_mean, atol=1e-6)


# ---------------------------------------------------------------- differentiable quantization


def test_the_weights_stay_and_the_points_move():
    start = with_norm()
    target = learned(dataclasses.replace(PLAIN, steps=8), student=with_norm())
    for name, p in start.named_parameters():
        book, code = Codebook(p, 4, 16), target.codes[name]
        assert torch.equal(code.low, book.low.flatten()) and torch.equal(code.high, book.high.flatten())
        assert (code.points.diff() >= 0).all() and torch.equal(dict(target.model.named_parameters())[name],
                                                               code.decode())
    moved = [not torch.equal(target.codes[n].points, Codebook(p, 4, 16).points) for n, p in start.named_parameters()]
    assert all(moved) and target.model[1].num_batches_tracked == 8


def test_its_teacher_is_its_own_full_precision():
    x = system.tiny()["labelled"].image

    def large():
        net = system.tiny()["student"]
        with torch.no_grad():
            for p in net.parameters():
                p *= 5
        return net

    config = dataclasses.replace(PLAIN, steps=150, rho=1.0, bits=3)
    before = learned(dataclasses.replace(config, steps=0), student=large())
    run = Run(quiet=True)
    after = learned(config, student=large(), run=run)
    assert kl(large()(x), after(x)) < 0.5 * kl(large()(x), before(x))
    assert run.history[-1]["kd"] < 0.5 * run.history[0]["kd"]


def test_points_are_allocated_by_the_norms_of_the_gradients():
    config = dataclasses.replace(PLAIN, steps=0, points=1.0, bits=3, allocate=True, batch=16, allocation_batches=1)
    student = system.tiny()["student"]
    batch = system.tiny()["labelled"]
    F.cross_entropy(student(batch.image), batch.label).backward()
    norms = [p.grad.norm().item() for p in student.parameters()]
    codes = trained(config, teacher=None).codes
    assert [c.levels for c in codes.values()] == allocate_points(norms, 8)
    assert sum(c.levels for c in codes.values()) == 4 * 8 and len({c.levels for c in codes.values()}) > 1


def test_even_points_that_are_not_trained_give_the_uniform_quantiser():
    even = learned(dataclasses.replace(PLAIN, steps=0, start="even"))
    uniform = trained(dataclasses.replace(PLAIN, steps=0))
    for a, b in zip(even.model.parameters(), uniform.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


# ---------------------------------------------------------------- alternating


def test_the_two_take_turns_and_weights_have_the_last():
    plan = phases(Config(steps=100, points=0.4, rounds=3))
    assert [p.kind for p in plan] == ["weights", "points"] * 3 + ["weights"]
    assert sum(p.steps for p in plan if p.kind == "weights") == 60 and sum(p.steps for p in plan) == 100
    assert [p.before for p in plan if p.kind == "weights"] == [0, 15, 30, 45] and len({p.name for p in plan}) == 7
    assert [p.kind for p in phases(Config(points=0))] == ["weights"]
    assert phases(Config(points=1, steps=7)) == [("points", "points", 7, 0)]


def test_the_weights_go_on_from_the_points_learned():
    recorder = Recorder(system.tiny()["student"])
    config = dataclasses.replace(PLAIN, steps=9, points=1 / 3, allocate=True)
    target = trained(config, student=recorder)
    assert len(recorder.weights) == 9 and all(c.points is None for c in target.codes.values())
    levels = max(len(b.unique()) for b in to_buckets(recorder.weights[6], 16))
    assert levels <= 4 and torch.equal(recorder.weights[6], quantize(recorder.weights[6], 4, 16))
    assert not same(target.model.model, trained(dataclasses.replace(config, points=0.0)).model)


# ---------------------------------------------------------------- errors, contract


def test_wrong_input_is_named_before_any_step():
    for wrong, match in (({"bits": 0}, "bits"), ({"bucket": 0}, "bucket"), ({"points": 1.5}, "points"),
                         ({"rho": 2.0}, "rho"), ({"tensors": "some"}, "tensors"), ({"gradient": "none"}, "gradient"),
                         ({"points_lr": 0.0}, "points_lr"), ({"rounds": 0}, "rounds")):
        with pytest.raises(ConfigError, match=match):
            Config(**wrong)
    with pytest.raises(RoleError, match="needs a teacher"):
        trained(teacher=None)
    with pytest.raises(RoleError, match="leave teacher out"):
        trained(dataclasses.replace(PLAIN, points=1.0))
    with pytest.raises(RoleError, match="teacher has 4|student has 3"):
        trained(student=nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    with pytest.raises(DataError, match="label"):
        trained(labelled=TensorSet(image=torch.rand(5, 1, 8, 8)))
    with pytest.raises(RoleError, match="no parameter is named"):
        trained(dataclasses.replace(PLAIN, keep=("head.*",)))
    with pytest.raises(ConfigError, match="no points to learn"):
        learned(dataclasses.replace(PLAIN, tensors="none"))
    assert trained(dataclasses.replace(PLAIN, rho=0.0), teacher=None).codes


@pytest.mark.parametrize("changes", [{}, {"points": 1.0, "allocate": True}, {"tensors": "weights", "keep": ("1.*",)}])
def test_the_contract(changes):
    def inputs():
        given = system.tiny()
        given["config"] = dataclasses.replace(given["config"], steps=5, **changes)
        return given if changes.get("points") != 1.0 else {**given, "teacher": None}

    check_system(distill, inputs)


# ---------------------------------------------------------------- from the command line, and real models


def test_it_runs_from_the_command_line_and_the_result_is_read_back(tmp_path, monkeypatch, capsys):
    from stillhouse.cli import main
    from stillhouse.hub.models import resolve_model
    from stillhouse.protocols import Classifier

    monkeypatch.chdir(tmp_path)
    words = ["run", "quantized-distillation", "--student", "tiny-convnet", "--labelled", "digits:size=8", "--quiet",
             "--config.steps", "2", "--config.bits", "2"]
    main([*words, "--teacher", "tiny-convnet", "--out", "a"])
    main([*words, "--config.points", "1", "--out", "b"])
    assert "stillhouse.load('b')" in capsys.readouterr().out
    assert type(stillhouse.load("a")) is QuantizedModel
    for folder in ("a", "b"):
        model = resolve_model(folder, Classifier, arch="tiny-convnet")
        assert len(to_buckets(model.body[2][0].weight, 256)[0].unique()) <= 4
        assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_it_runs_on_a_resnet_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from stillhouse.hub.models import fit_role
    from stillhouse.hub.transformers import load
    from stillhouse.protocols import Classifier

    torch.manual_seed(0)
    for name, sizes in (("teacher", [16, 16]), ("student", [8, 8])):
        transformers.ResNetForImageClassification(transformers.ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=sizes, depths=[1, 1], layer_type="basic", num_labels=4,
        )).save_pretrained(tmp_path / name)
    teacher, student = (load(str(tmp_path / name), Classifier) for name in ("teacher", "student"))
    before = copy.deepcopy(teacher)
    config = dataclasses.replace(PLAIN, steps=4, batch=8, bucket=64, spare_ends=True, keep=("*normalization*",))
    target = trained(config, teacher=teacher, student=student)
    assert target.model is student and same(teacher, before)
    assert target.codes and all("convolution" in name for name in target.codes)
    size = model_size(target)
    assert 6 < size.ratio < 11
    points = learned(dataclasses.replace(config, allocate=True), student=student)
    points.save(tmp_path / "packed")
    fresh = fit_role(transformers.ResNetForImageClassification(student.model.config), Classifier, "fresh")
    QuantizedModel.load(tmp_path / "packed", fresh)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(fresh.eval()(x), student.eval()(x))
    student.model.save_pretrained(tmp_path / "exported")
    assert torch.equal(load(str(tmp_path / "exported"), Classifier).eval()(x), student(x))


class Translator(nn.Module):
    """A sequence-to-sequence model as a classifier of target tokens: sources and shifted targets side by side in,
    logits [batch, length, vocabulary] out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        source, shifted = tokens.chunk(2, 1)
        return self.model(input_ids=source, attention_mask=(source != 0).long(), decoder_input_ids=shifted).logits


def test_it_runs_on_a_translation_model(tmp_path):
    """MarianMTModel: tied embeddings, fixed positions, a loss for every target token but the padding."""
    transformers = pytest.importorskip("transformers")

    def marian(width):
        config = transformers.MarianConfig(
            vocab_size=30, d_model=width, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, dropout=0.0)
        transformers.MarianMTModel(config).save_pretrained(tmp_path / f"marian-{width}")
        return Translator(transformers.MarianMTModel.from_pretrained(tmp_path / f"marian-{width}"))

    torch.manual_seed(0)
    teacher, student = marian(16), marian(8)
    source = torch.randint(2, 30, (24, 6))
    source[::3, 4:] = 0
    target_tokens = source.flip(1)
    shifted = F.pad(target_tokens[:, :-1], (1, 0))
    data = TensorSet(image=torch.cat([source, shifted], 1),
                     label=target_tokens.masked_fill(target_tokens == 0, -100))
    config = Config(steps=30, batch=12, bits=4, bucket=64, lr=0.3, keep=("*layer_norm*", "*embed_positions*"))
    before = [n for n, _ in student.named_parameters()]
    run = Run(quiet=True)
    target = distill(student, data, teacher, config, run)
    assert run.history[-1]["kd"] + run.history[-1]["ce"] < run.history[0]["kd"] + run.history[0]["ce"]
    model = target.model.model
    assert model.lm_head.weight is model.model.shared.weight
    assert all(len(b.unique()) <= 16 for b in to_buckets(model.lm_head.weight, 64))
    assert not set(target.codes) & {n for n in before if "layer_norm" in n or "embed_positions" in n}
    assert all(len(b.unique()) <= 16 for b in to_buckets(model.model.encoder.layers[0].fc1.weight, 64))
    points = distill(student, data, None, dataclasses.replace(config, points=1.0, steps=3, keep=()), Run(quiet=True))
    assert set(points.codes) == {n for n, _ in student.named_parameters()}
    points.save(tmp_path / "packed")
    loaded = QuantizedModel.load(tmp_path / "packed", marian(8)).model
    assert torch.equal(loaded.eval()(data.image), student.eval()(data.image))
    n = sum(c.index.numel() for c in points.codes.values())
    buckets = sum(max(1, math.ceil(c.index.numel() / 64)) for c in points.codes.values())
    bits = sum(c.bits * c.index.numel() for c in points.codes.values())
    learned_points = sum(c.levels for c in points.codes.values())
    assert model_size(points).quantized == bits + 64 * buckets + 32 * learned_points < 32 * n
    assert model.generate(source[:2], max_new_tokens=4).shape[0] == 2
