import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stillhouse
from stillhouse.data.sets import TensorSet
from stillhouse.deploy import targets
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.evaluate.similarity import heat_map, layer_similarity
from stillhouse.hub.models import resolve_model
from stillhouse.measures.classes import enhanced_cross_entropy, enhanced_target
from stillhouse.measures.divergences import kl, soft_cross_entropy
from stillhouse.measures.relations import cka, gram, hsic, rbf_gram
from stillhouse.models.convnets import MLP, ConvNet, SmallResNet, TinyConvNet
from stillhouse.models.vit import SmallMixer, SmallViT
from stillhouse.parts.exits import ConvExit, PatchMerging, TokenExit, exit_branches, stage_width
from stillhouse.parts.stages import stages_of
from stillhouse.parts.taps import taps
from stillhouse.protocols import Classifier
from stillhouse.recipes.views import mixed
from stillhouse.run import Run, frozen
from stillhouse.systems.compression import ofa_kd
from stillhouse.systems.compression.ofa_kd import Config, distill, exits_of
from stillhouse.testing import check_system

D = torch.float64


def logits(*shape, seed=0):
    return 2 * torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def trained(**changes):
    given = ofa_kd.tiny()
    given.update(changes)
    return distill(**given, run=Run(quiet=True))


def changed(**fields):
    return dataclasses.replace(ofa_kd.tiny()["config"], **fields)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---------------------------------------------------------------- the loss


def test_at_eps_1_the_target_is_the_teacher():
    z_t, z_s, y = logits(20, 6), logits(20, 6, seed=1), torch.arange(20) % 6
    assert torch.allclose(enhanced_target(z_t, y), z_t.softmax(1), atol=1e-15)
    loss = enhanced_cross_entropy(z_t, z_s, y)
    p = z_t.softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    assert loss.item() == pytest.approx(soft_cross_entropy(z_t, z_s).item(), abs=1e-14)
    assert loss.item() == pytest.approx((kl(z_t, z_s) + entropy).item(), abs=1e-14)


def test_the_weights_of_three_classes():
    z_t = torch.tensor([[0.5, 0.3, 0.2]], dtype=D).log()
    w = enhanced_target(z_t, torch.tensor([0]), 1.5)
    expected = [1.5**1.5 - 1, 0.3**1.5, 0.2**1.5]
    assert torch.allclose(w, torch.tensor([expected], dtype=D), atol=1e-15)
    assert [round(v, 5) for v in w[0].tolist()] == [0.83712, 0.16432, 0.08944]


@pytest.mark.parametrize("eps", [1.0, 1.2, 1.5, 2.0])
def test_with_the_labels_loss_the_label_weighs_1_plus_p_to_the_eps(eps):
    z_t, y = logits(8, 5), torch.arange(8) % 5
    log_q = logits(8, 5, seed=1).log_softmax(1).requires_grad_()
    own = F.one_hot(y, 5).bool()
    total = F.nll_loss(log_q, y) - (enhanced_target(z_t, y, eps) * log_q).sum(1).mean()
    total.backward()
    p = z_t.softmax(1)
    assert torch.allclose(-8 * log_q.grad[own], (1 + p[own]) ** eps, atol=1e-13)
    assert torch.allclose(-8 * log_q.grad[~own], p[~own] ** eps, atol=1e-13)


def test_a_larger_eps_raises_the_label_and_lowers_the_others():
    z_t, y = logits(30, 5), torch.arange(30) % 5
    own = F.one_hot(y, 5).bool()
    small, large = enhanced_target(z_t, y, 1.0), enhanced_target(z_t, y, 1.5)
    assert (large[own] > small[own]).all() and (large[~own] < small[~own]).all()


def test_the_temperature_divides_both_and_multiplies_nothing():
    z_t, z_s, y = logits(6, 4), logits(6, 4, seed=1), torch.arange(6) % 4
    assert enhanced_cross_entropy(z_t, z_s, y, 1.5, 4.0).item() == pytest.approx(
        enhanced_cross_entropy(z_t / 4, z_s / 4, y, 1.5).item(), abs=1e-14)
    with pytest.raises(ConfigError, match="eps"):
        enhanced_target(z_t, y, 0.0)


# ---------------------------------------------------------------- exit branches


def test_branches_of_maps_halve_as_often_as_stages_follow():
    stages = {"a": (4, 16, 16), "b": (8, 8, 8), "c": (12, 4, 4), "d": (20, 2, 2)}
    branches = exit_branches(stages, 7, teacher_width=24)
    for after, branch, shape in zip((3, 2, 1, 0), branches, stages.values(), strict=True):
        assert isinstance(branch, ConvExit) and branch(torch.randn(3, *shape)).shape == (3, 7)
        strides = [m.stride for m in branch.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        assert strides == [(2, 2), (1, 1)] * after and branch.head.in_features == 24
        x = branch.body(torch.randn(3, *shape))
        assert x.shape[2:] == tuple(max(1, side // 2**after) for side in shape[1:])
    widths = [m.out_channels for m in branches[0].modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    assert widths == [4, 8, 8, 16, 16, 24]
    assert exit_branches(stages, 7)[3].head.in_features == 20


def test_branches_of_tokens_merge_patches_and_keep_class_tokens():
    exit_ = TokenExit(1 + 14 * 14, 8, after=2, width=12, classes=5)
    assert [type(m) for m in exit_.merging] == [PatchMerging] and len(exit_.blocks) == 2 and exit_.prefix == 1
    seen = []
    exit_.blocks.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(3, 197, 8)
    assert exit_(x).shape == (3, 5) and seen[0].shape == (3, 1 + 49, 12)
    assert torch.equal(seen[0][:, 0], exit_.classes_to_width(x[:, 0]))
    x[:, 1:] = torch.randn(3, 196, 8)
    exit_(x)
    assert torch.equal(seen[0][:, 0], seen[1][:, 0])
    for side, merges in ((7, 0), (4, 0), (8, 1), (14, 1), (28, 2), (56, 3)):
        made = TokenExit(side * side, 4, 0, 4, 3)
        assert len([m for m in made.merging if isinstance(m, PatchMerging)]) == merges and len(made.blocks) == 1
        assert made(torch.randn(2, side * side, 4)).shape == (2, 3)
    assert TokenExit(16, 4, 0, 4, 3, grid=2).merging[0](torch.randn(2, 16, 4)).shape == (2, 4, 4)


def test_without_class_token_the_mean_of_the_tokens_is_read():
    exit_ = TokenExit(16, 6, 1, 6, 3).eval()
    x = torch.randn(2, 16, 6)
    assert torch.allclose(exit_(x), exit_(x[:, torch.randperm(16)]), atol=1e-6)
    with_class = TokenExit(17, 6, 1, 6, 3).eval()
    x = torch.randn(2, 17, 6)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(16)])
    assert torch.allclose(with_class(x), with_class(x[:, order]), atol=1e-6)
    assert not torch.allclose(with_class(x), with_class(x.flip(1)), atol=1e-4)


def test_merging_takes_two_by_two_neighbours_and_pads_odd_sides():
    merging = PatchMerging(1, 4)
    tokens = torch.arange(16.0).view(1, 16, 1)
    seen = []
    merging.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    merging(tokens)
    assert seen[0][0].tolist() == [[0, 4, 1, 5], [2, 6, 3, 7], [8, 12, 9, 13], [10, 14, 11, 15]]
    assert merging(torch.randn(1, 9, 1)).shape == (1, 4, 4)


def test_features_of_other_forms_are_refused():
    with pytest.raises(RoleError, match="maps"):
        stage_width((4,))
    with pytest.raises(RoleError, match="stage"):
        exit_branches({}, 3)


@pytest.mark.parametrize("network", [
    lambda: SmallResNet(width=4), lambda: ConvNet(width=4, depth=4, image_size=16),
    lambda: SmallViT(width=8, depth=5, heads=2), lambda: SmallViT(width=8, depth=2, class_token=False),
    lambda: SmallMixer(width=8, depth=2)])
def test_every_family_gets_branches(network):
    image = torch.randn(4, 1, 16, 16)
    student = network()
    stages, exits = exits_of(SmallViT(), student, image, 10, Config())
    kind = TokenExit if isinstance(student, SmallViT | SmallMixer) else ConvExit
    with taps(student, stages) as features:
        student(image)
    assert all(isinstance(b, kind) for b in exits)
    assert all(branch(features[s]).shape == (4, 10) for s, branch in zip(stages, exits, strict=True))


# ---------------------------------------------------------------- the system


def test_branches_learn_from_the_teacher_alone_and_the_student_from_both():
    given = ofa_kd.tiny()
    batch = given["labelled"].batch(range(6))
    x, y = batch["image"], batch["label"]
    stages, exits = exits_of(given["teacher"], given["student"], x, 4, given["config"])
    with frozen(given["teacher"]), taps(given["student"], stages) as features:
        z_t, z_s = given["teacher"](x), given["student"](x)
        F.cross_entropy(z_s, y).backward(retain_graph=True)
        assert all(p.grad is None for p in exits.parameters())
        given["student"].zero_grad()
        enhanced_cross_entropy(z_t, exits[0](features[stages[0]]), y, 1.5).backward()
    assert all(p.grad is not None for p in exits[0].parameters())
    assert all(p.grad is None for p in exits[1].parameters()) and given["student"][4].weight.grad is None
    assert given["student"][0].weight.grad.abs().sum() > 0 and given["teacher"].head.weight.grad is None


def test_the_student_is_returned_as_it_was_built():
    given = ofa_kd.tiny()
    names = list(given["student"].state_dict())
    student = distill(**given, run=Run(quiet=True))
    assert student is given["student"] and list(student.state_dict()) == names
    assert not any(m._forward_hooks for m in student.modules())
    assert not any(isinstance(m, ConvExit | TokenExit) for m in student.modules())


def test_every_term_reaches_the_student():
    base = trained()
    for fields in ({"ofa": 0.0, "eps": (1.0,)}, {"kd": 0.0}, {"gt": 0.0}, {"eps": (1.0,)}, {"eps": (1.5, 1.2, 2.0)},
                   {"temperature": 3.0}, {"mixup": 0.0}, {"cutmix": 0.0}, {"smoothing": 0.0}, {"clip": 0.01}):
        assert not same(trained(config=changed(**fields)), base), fields


def test_without_branches_at_eps_1_it_is_the_cross_entropy_with_both():
    given = ofa_kd.tiny()
    config = Config(steps=3, batch=12, lr=0.1, warmup=0.0, weight_decay=0.0, ofa=0.0, smoothing=0.0)
    student, teacher = copy.deepcopy(given["student"]), given["teacher"].eval()
    found = trained(config=config)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    x, y = given["labelled"].image, given["labelled"].label
    for k in range(3):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * k / 3))
        z_s = student(x)
        loss = F.cross_entropy(z_s, y) + soft_cross_entropy(teacher(x).detach(), z_s)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for a, b in zip(found.parameters(), student.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_under_mixing_the_class_of_the_larger_share_is_stressed():
    run = Run(seed=3, quiet=True)
    image, label = torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    for _ in run.loop("mix", None, steps=6):
        x, soft = mixed(image, label, 4, run, mixup_alpha=0.8, cutmix_alpha=1.0, smoothing=0.1)
        assert x.shape == image.shape and torch.allclose(soft.sum(1), torch.ones(8), atol=1e-6)
        share = (soft.gather(1, label[:, None])[:, 0] - 0.025) / 0.9
        assert torch.equal(soft.argmax(1) == label, share > 0.5)
        partner = label.roll(-1)
        assert torch.allclose((soft.gather(1, partner[:, None])[:, 0] - 0.025) / 0.9, 1 - share, atol=1e-5)
    plain, own = mixed(image, label, 4, run)
    assert torch.equal(plain, image) and torch.equal(own, F.one_hot(label, 4).float())


def test_settings_that_cannot_be_meant_are_refused_before_any_work():
    for fields in ({"eps": ()}, {"eps": (0.0,)}, {"gt": 0.0, "kd": 0.0}, {"ofa": -1.0}, {"temperature": 0.0},
                   {"grid": 0}, {"smoothing": 1.0}, {"clip": 0.0}, {"mixup": -1.0}):
        with pytest.raises(ConfigError):
            Config(**fields)
    for changes, error in (({"config": changed(eps=(1.0, 1.0))}, ConfigError),
                           ({"student": MLP(64, 4), "config": Config(steps=1, batch=4)}, RoleError),
                           ({"teacher": SmallViT(classes=5, image_size=8, width=8)}, RoleError)):
        run = Run(quiet=True)
        with pytest.raises(error):
            distill(**{**ofa_kd.tiny(), **changes}, run=run)
        assert not run.begun
    flat = trained(student=MLP(64, 4, (8,)), config=Config(steps=2, batch=4, ofa=0.0))
    assert isinstance(flat, MLP)


def test_a_transformer_keeps_the_contract_as_student():
    def inputs():
        torch.manual_seed(0)
        data = TensorSet(image=torch.rand(12, 1, 8, 8), label=torch.arange(12) % 4)
        return {"teacher": TinyConvNet(classes=4), "student": SmallViT(1, 4, 8, 2, 8, 2, 2), "labelled": data,
                "config": Config(steps=3, batch=6, lr=0.01, grid=2, optimizer="adamw")}

    check_system(distill, inputs)


# ---------------------------------------------------------------- real model classes


def _real():
    transformers = pytest.importorskip("transformers")
    small = {"num_labels": 4, "num_channels": 3}
    return transformers, {
        "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=12, num_attention_heads=2, intermediate_size=8, image_size=32,
            patch_size=4, **small)),
        "swin": lambda: transformers.SwinForImageClassification(transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 2], window_size=4, **small)),
        "resnet": lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", **small)),
        "convnext": lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(
            hidden_sizes=[8, 8, 16], depths=[1, 1, 1], num_stages=3, patch_size=2, **small)),
        "mobilenet": lambda: transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(
            depth_multiplier=0.25, image_size=32, **small)),
    }


@pytest.mark.parametrize(("teacher", "student"), [("vit", "resnet"), ("resnet", "vit"), ("swin", "mobilenet"),
                                                  ("convnext", "swin"), ("resnet", "convnext")])
def test_models_of_transformers_teach_each_other_and_are_loaded_back(teacher, student, tmp_path):
    _, made = _real()
    torch.manual_seed(0)
    models = {}
    for role, name in (("teacher", teacher), ("student", student)):
        made[name]().save_pretrained(tmp_path / name)
        models[role] = resolve_model(f"hf:{tmp_path / name}", Classifier)
    data = TensorSet(image=2 * torch.rand(8, 3, 32, 32) - 1, label=torch.arange(8) % 4)
    config = Config(steps=2, batch=4, lr=0.01, eps=(1.5,), grid=4)
    stages = stages_of(models["student"], data.image[:2])
    assert 2 <= len(stages) <= 4 and all(len(s) in (2, 3) for s in stages.values())
    before = copy.deepcopy(models["student"])
    result = distill(**models, labelled=data, config=config, run=Run(quiet=True))
    assert not same(result, before)
    about = targets.about_run("ofa-kd", {**models, "labelled": data}, config)
    targets.save(result, tmp_path / "saved", about)
    loaded = stillhouse.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(data.image), result.eval()(data.image))


# ---------------------------------------------------------------- CKA


def test_cka_of_a_layer_with_itself_turned_and_scaled_is_1():
    x = logits(40, 6)
    turn = torch.linalg.qr(logits(6, 6, seed=1))[0]
    for kernel in (gram, rbf_gram):
        k = kernel(x)
        for y in (x, 3 * x @ turn + 1 if kernel is rbf_gram else 3 * x @ turn):
            m = kernel(y)
            value = hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()
            assert value.item() == pytest.approx(1, abs=1e-12)
    assert cka(x, 3 * x @ turn + 5).item() == pytest.approx(1, abs=1e-12)
    stretched = x @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1], dtype=D))
    assert cka(x, stretched) < 0.99


def test_hsic_is_the_trace_form_and_its_unbiased_estimate_is_0_on_average():
    x, y = logits(12, 3), logits(12, 5, seed=1)
    k, m = gram(x), gram(y)
    h = torch.eye(12, dtype=D) - 1 / 12
    assert hsic(k, m).item() == pytest.approx(((k @ h @ m @ h).trace() / 121).item(), abs=1e-12)
    a, b = x - x.mean(0), y - y.mean(0)
    assert hsic(k, m).item() == pytest.approx(((a.T @ b).square().sum() / 121).item(), abs=1e-12)
    draws = [(hsic(gram(logits(8, 20, seed=i)), gram(logits(8, 20, seed=1000 + i)), unbiased=u))
             for u in (True, False) for i in range(300)]
    unbiased, biased = torch.stack(draws[:300]), torch.stack(draws[300:])
    assert unbiased.mean().abs() < 3 * unbiased.std() / 300**0.5 and biased.mean() > 10 * biased.std() / 300**0.5
    with pytest.raises(DataError, match="at least 4"):
        hsic(k[:3, :3], m[:3, :3], unbiased=True)


def test_similarity_of_two_models_over_a_set():
    torch.manual_seed(0)
    a, b = ConvNet(width=4, depth=2, image_size=16), SmallViT(width=8, depth=3, heads=2)
    a.train()
    data = TensorSet(image=torch.randn(30, 1, 16, 16))
    for kernel in ("linear", "rbf"):
        own = layer_similarity(a, a, data, kernel=kernel, batch=10)
        assert torch.allclose(own.diagonal(), torch.ones(3, dtype=D), atol=1e-12)
        assert torch.allclose(own, own.T, atol=1e-12)
        across = layer_similarity(a, b, data, kernel=kernel, batch=10, pool=True)
        assert across.shape == (3, 3) and (across < 1).all()
    assert a.training and all(p.requires_grad for p in a.parameters())
    whole = layer_similarity(a, b, data, batch=30)
    assert not torch.allclose(whole, layer_similarity(a, b, data, batch=10)) and torch.allclose(
        whole, layer_similarity(a, b, data.select(range(29, -1, -1)), batch=30), atol=1e-9)
    figure = heat_map(whole, ["1", "2", "3"], ["1", "2", "3"], "a", "b")
    assert figure.axes[0].get_xlabel() == "b"


def test_similarity_refuses_what_it_cannot_measure():
    data = TensorSet(image=torch.randn(3, 1, 16, 16))
    net = TinyConvNet()
    with pytest.raises(DataError, match="4 pictures"):
        layer_similarity(net, net, data)
    data = TensorSet(image=torch.randn(5, 1, 16, 16))
    with pytest.raises(RoleError, match="second model"):
        layer_similarity(net, MLP(256), data)
    with pytest.raises(ConfigError, match="kernel"):
        layer_similarity(net, net, data, kernel="cosine")
