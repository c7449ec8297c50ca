import dataclasses
import math

import pytest
import torch
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError, UnknownNameError
from stillhouse.evaluate.cost import saved_bytes
from stillhouse.measures.contrastive import info_nce
from stillhouse.measures.local_contrast import channel_contrast, window_contrast, window_means, window_sizes
from stillhouse.models.convnets import ConvNet, SmallResNet, SmallVGG, TinyConvNet
from stillhouse.models.vit import SmallMixer, SmallViT
from stillhouse.parts.last_map import last_map, local_head
from stillhouse.parts.stages import feature_map
from stillhouse.parts.taps import taps
from stillhouse.run import Run, frozen
from stillhouse.systems.compression import msdcrd
from stillhouse.systems.compression.msdcrd import Config, distill, transfer


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quiet():
    return Run(quiet=True).begin()


def trained(**changes):
    return distill(**{**msdcrd.tiny(), **changes}, run=Run(quiet=True))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(("size", "grid"), [((1, 1), (7, 5)), ((3, 3), (7, 5)), ((7, 2), (7, 5)), ((2, 2), (2, 2))])
def test_there_are_as_many_windows_as_places_for_them(size, grid):
    x = draw(2, 3, *grid)
    means = window_means(x, size)
    rows, columns = grid[0] - size[0] + 1, grid[1] - size[1] + 1
    assert means.shape == (2, rows * columns, 3)
    y, c = (rows - 1, columns - 1)
    last = x[:, :, y : y + size[0], c : c + size[1]].mean((2, 3))
    assert torch.allclose(means[:, -1], last, atol=1e-15)


def test_the_window_of_the_whole_map_is_global_average_pooling():
    x = torch.randn(4, 6, 8, 8)
    assert torch.equal(window_means(x, (8, 8))[:, 0], x.mean((2, 3)))
    assert torch.equal(window_means(x, (1, 1)), x.flatten(2).transpose(1, 2))


def test_window_sizes_are_parts_of_the_side_and_come_once():
    assert window_sizes((8, 8), (1.0, 0.5, 0.25)) == [(8, 8), (4, 4), (2, 2)]
    assert window_sizes((7, 7), (1.0, 0.5, 0.25)) == [(7, 7), (4, 4), (2, 2)]
    assert window_sizes((2, 4), (1.0, 0.5, 0.25, 0.1)) == [(2, 4), (1, 2), (1, 1)]
    with pytest.raises(ConfigError, match="parts of a map"):
        window_sizes((8, 8), (1.5,))
    with pytest.raises(DataError, match="does not fit"):
        window_means(torch.zeros(1, 1, 2, 2), (3, 3))


# ---------------------------------------------------------------- the losses


def test_equal_orthonormal_sets_have_the_known_loss():
    for tau in (0.07, 0.5):
        n, windows = 3, 4
        vectors = torch.linalg.qr(draw(16, 16)).Q[: n * windows].view(n, windows, 16)
        known = -math.log(math.exp(1 / tau) / (math.exp(1 / tau) + n * windows - 1))
        assert window_contrast(vectors, vectors, tau).item() == pytest.approx(known, abs=1e-12)
        place = -math.log(math.exp(1 / tau) / (math.exp(1 / tau) + n - 1))
        assert window_contrast(vectors, vectors, tau, same_place=True).item() == pytest.approx(place, abs=1e-12)


def test_rows_and_columns_agree_with_info_nce():
    s, t = draw(5, 3, 7, seed=1), draw(5, 3, 7, seed=2)
    assert torch.allclose(window_contrast(s, t, 0.2), info_nce(s.flatten(0, 1), t.flatten(0, 1), temperature=0.2))
    one = torch.stack([info_nce(s[:, p], t[:, p], temperature=0.2) for p in range(3)]).mean()
    assert torch.allclose(window_contrast(s, t, 0.2, same_place=True), one)
    flat = s.flatten(0, 1), t.flatten(0, 1)
    assert torch.allclose(channel_contrast(*flat, 0.2), info_nce(flat[0].T, flat[1].T, temperature=0.2))


def test_what_leaves_the_losses_as_they_are():
    s, t = draw(5, 3, 7, seed=1), draw(5, 3, 7, seed=2)
    group, label = torch.randint(2, (5, 3)), torch.tensor([0, 1, 1, 0, 2])
    order, channels = torch.randperm(5), torch.randperm(7)
    for place in (False, True):
        loss = window_contrast(s, t, 0.1, place, group, label)
        again = window_contrast(s[order], t[order], 0.1, place, group[order], label[order])
        assert torch.allclose(loss, again, atol=1e-13)
        assert torch.allclose(window_contrast(3.7 * s, 0.2 * t, 0.1, place, group, label), loss, atol=1e-13)
    s, t = s.flatten(0, 1), t.flatten(0, 1)
    loss = channel_contrast(s, t)
    assert torch.allclose(channel_contrast(s[:, channels], t[:, channels]), loss, atol=1e-13)
    assert torch.allclose(channel_contrast(3.7 * s, 0.2 * t), loss, atol=1e-13)


def test_at_collapse_the_loss_is_log_n_or_more():
    t = draw(6, 4, 8, seed=3)
    s = draw(8, seed=4).expand(6, 4, 8)
    assert window_contrast(s, t, 0.1) > math.log(24)
    same = t[:1, :1].expand(6, 4, 8)
    assert window_contrast(s, same, 0.1).item() == pytest.approx(math.log(24), abs=1e-12)


def test_groups_and_classes_choose_the_negatives():
    s, t = draw(4, 2, 5, seed=5), draw(4, 2, 5, seed=6)
    group = torch.tensor([[0, 1], [0, 0], [1, 1], [0, 1]])
    losses = window_contrast(s, t, 0.3, group=group, reduction="none")
    for value in (0, 1):
        mine = group == value
        alone = info_nce(s[mine], t[mine], temperature=0.3, reduction="none")
        assert torch.allclose(losses[mine], alone)
    label = torch.tensor([0, 0, 1, 1])
    losses = window_contrast(s, t, 0.3, same_place=True, label=label, reduction="none")
    pair = info_nce(s[[0, 2], 0], t[[0, 2], 0], temperature=0.3, reduction="none")[0]
    assert losses[0, 0] > pair
    three = info_nce(s[[0], 0], t[[0], 0], t[[2, 3], 0], temperature=0.3)
    assert torch.allclose(losses[0, 0], three)
    within = window_contrast(s, t, 0.3, label=label, reduction="none")[0, 0]
    assert torch.allclose(within, info_nce(s[[0], 0], t[[0], 0], torch.cat([t[0, 1:], t[2:].flatten(0, 1)]),
                                           temperature=0.3))


def test_channels_of_one_group_alone():
    s, t = draw(9, 4, seed=7), draw(9, 4, seed=8)
    mask = torch.arange(9) < 5
    assert torch.allclose(channel_contrast(s, t, 0.2, mask), channel_contrast(s[:5], t[:5], 0.2))
    leaf = s.clone().requires_grad_()
    (0.0 * channel_contrast(leaf, t, 0.2, torch.zeros(9, dtype=torch.bool))).backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.unchecked
def test_wrong_shapes_and_temperatures_are_refused():
    with pytest.raises(DataError, match="one shape"):
        window_contrast(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    with pytest.raises(ConfigError, match="temperature"):
        channel_contrast(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)


# ---------------------------------------------------------------- the last map and the head on its places


@pytest.mark.parametrize(("model", "path", "shape"), [
    (TinyConvNet(), "body.4", (20, 4, 4)), (SmallResNet(width=4), "body.3", (16, 4, 4)),
    (SmallViT(width=8), "norm", (17, 8)), (SmallViT(width=8, class_token=False), "norm", (16, 8)),
    (SmallMixer(width=8), "norm", (16, 8))], ids=lambda v: type(v).__name__)
def test_the_head_on_the_pooled_map_gives_the_logits(model, path, shape):
    x = torch.randn(3, 1, 16, 16)
    was = {name: value.clone() for name, value in model.state_dict().items()}
    assert last_map(model, x) == (path, shape)
    head = local_head(model, x, path)
    assert model.training and all(torch.equal(was[n], v) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    with frozen(model), torch.no_grad(), taps(model, [path]) as features:
        logits = model(x)
        f = features[path]
        pooled = f[:, 0] if shape == (17, 8) else f.mean(1) if f.dim() == 3 else f.mean((2, 3))
        assert torch.allclose(head(pooled), logits, atol=1e-5)
        local = head(feature_map(f).flatten(2).transpose(1, 2))
    assert local.shape == (3, 16, 10)


def test_where_there_is_no_map_or_no_local_head_it_is_said():
    x = torch.randn(2, 1, 16, 16)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(256, 4))
    with pytest.raises(RoleError, match="neither a map"):
        last_map(flat, x)
    for model in (ConvNet(width=4, depth=2, image_size=16), SmallVGG(width=4, image_size=16)):
        with pytest.raises(RoleError, match="cannot be put on single places"):
            local_head(model, x, last_map(model, x)[0])
    with pytest.raises(UnknownNameError):
        last_map(TinyConvNet(), x, "nowhere")
    with pytest.raises(UnknownNameError, match="no module"):
        local_head(TinyConvNet(), x, "nowhere")
    assert last_map(TinyConvNet(), x, "body.2") == ("body.2", (16, 8, 8))


# ---------------------------------------------------------------- the system


def test_only_student_and_projector_get_gradients():
    given = msdcrd.tiny()
    run = quiet()
    config = dataclasses.replace(given["config"], ce=0.0, kd=0.0)
    t_map, s_map, projector, head = msdcrd.prepare(given["teacher"], given["student"], given["data"], config, run)
    batch = given["data"].batch([0, 1, 2, 3])
    with taps(given["teacher"], [t_map]) as of_teacher, taps(given["student"], [s_map]) as of_student:
        with torch.no_grad():
            target = given["teacher"](batch["image"])
        given["student"](batch["image"])
        terms = msdcrd.contrast(projector(of_student[s_map]), of_teacher[t_map], target, batch["label"], head, config,
                                run)
    torch.stack([*terms.values()]).sum().backward()
    assert all(p.grad is None for p in given["teacher"].parameters())
    assert all(p.grad.abs().sum() > 0 for p in projector.conv.parameters())
    assert given["student"][0].weight.grad.abs().sum() > 0 and given["student"][4].weight.grad is None


def test_the_global_scale_alone_is_info_nce_of_pooled_features():
    given = msdcrd.tiny()
    config = dataclasses.replace(given["config"], scales=(1.0,), categories="none")
    f_s, f_t = torch.randn(4, 5, 3, 3), torch.randn(4, 5, 3, 3)
    terms = msdcrd.contrast(f_s, f_t, torch.zeros(4, 4), torch.zeros(4).long(), None, config, quiet())
    s, t = f_s.mean((2, 3)), f_t.mean((2, 3))
    assert torch.allclose(terms["sample"], info_nce(s, t, temperature=0.1))
    assert torch.allclose(terms["feature"], info_nce(s.T, t.T, temperature=0.1))


def test_windows_may_slide_by_half_their_size():
    config = Config(scales=(0.5,), stride="half", categories="none")
    f_s, f_t = torch.randn(3, 5, 8, 8), torch.randn(3, 5, 8, 8)
    terms = msdcrd.contrast(f_s, f_t, torch.zeros(3, 4), torch.zeros(3).long(), None, config, quiet())
    s, t = (window_means(f, (4, 4)).unflatten(1, (5, 5))[:, ::2, ::2].flatten(1, 2) for f in (f_s, f_t))
    assert s.shape == (3, 9, 5) and torch.allclose(terms["sample"], window_contrast(s, t, 0.1))


def test_every_setting_does_something():
    base = weights(trained())
    for changes in ({"sample": 0.0}, {"feature": 0.0}, {"beta": 0.0}, {"kd": 0.0}, {"ce": 0.5}, {"tau": 0.5},
                    {"scales": (1.0,)}, {"negatives": "place"}, {"same_class": False},
                    {"categories": "none"}, {"ambiguous": 0.0}, {"norm": True}, {"view": 0.0}):
        config = dataclasses.replace(msdcrd.tiny()["config"], **changes)
        assert not torch.allclose(weights(trained(config=config)), base, atol=1e-7), changes


def test_without_labels_the_teachers_own_answer_tells_reliable_windows():
    config = dataclasses.replace(msdcrd.tiny()["config"], ce=0.0, categories="teacher")
    data = msdcrd.tiny()["data"]
    first = weights(trained(config=config, data=data.without("label")))
    assert torch.equal(first, weights(trained(config=config)))
    assert not torch.equal(first, weights(trained(config=dataclasses.replace(config, categories="none"))))
    with pytest.raises(DataError, match="label"):
        trained(data=data.without("label"))


def test_models_of_other_classes_need_no_labels_and_no_kd():
    config = Config(steps=2, batch=4, ce=0.0, categories="teacher")
    student = TinyConvNet(classes=3, width=4)
    with pytest.raises(RoleError, match="classes"):
        trained(student=student)
    assert trained(student=student, config=config) is student


def test_student_windows_find_their_teachers_and_the_projector_is_returned():
    torch.manual_seed(0)
    data = TensorSet(image=torch.randn(24, 1, 8, 8), label=torch.arange(24) % 4)
    teacher = TinyConvNet(classes=4, width=4).eval()

    def loss_after(steps):
        torch.manual_seed(1)
        config = Config(steps=steps, batch=24, optimizer="adamw", lr=0.03, ce=0.0, categories="none", feature=0.0)
        with Run(quiet=True) as run:
            student, projector = transfer(teacher, TinyConvNet(classes=4, width=4), data, config, run)
        near = msdcrd.nearness(teacher, student, projector, data.image, config)
        assert near.shape == (24, 2, 2) and near.abs().max() <= 1 + 1e-6 and student.training
        with frozen(student), frozen(projector), torch.no_grad(), taps(student, ["body.4"]) as fs, taps(
                teacher, ["body.4"]) as ft:
            student(data.image), teacher(data.image)
            return window_contrast(window_means(projector(fs["body.4"]), (1, 1)), window_means(ft["body.4"], (1, 1)))

    assert loss_after(60) < loss_after(0) - 0.5


def test_two_kinds_of_networks_and_grids():
    torch.manual_seed(0)
    data = TensorSet(image=torch.randn(12, 1, 16, 16), label=torch.arange(12) % 10)
    config = Config(steps=2, batch=6, categories="label")
    for teacher, student in ((SmallViT(width=8, depth=1), SmallResNet(width=4)),
                             (TinyConvNet(), SmallViT(width=8, depth=1, patch=2)),
                             (SmallMixer(width=8, depth=1), ConvNet(width=4, depth=1, image_size=16))):
        before = weights(student)
        assert not torch.equal(weights(distill(teacher, student, data, config, Run(quiet=True))), before)


def test_bad_settings_are_refused():
    for wrong in ({"tau": 0.0}, {"scales": (0.0,)}, {"scales": ()}, {"stride": "two"}, {"negatives": "none"},
                  {"categories": "student"}, {"beta": -1.0}, {"ce": 0.0, "beta": 0.0}):
        with pytest.raises(ConfigError):
            Config(**wrong)


def test_what_a_forward_pass_keeps_is_counted_once():
    x = torch.randn(100, 10, requires_grad=True)
    with saved_bytes() as saved:
        y = (x.exp() * x).sum()
    assert saved.bytes == 2 * 4000 and y.requires_grad


def test_on_classifiers_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from stillhouse.hub.models import resolve_model
    from stillhouse.protocols import Classifier

    torch.manual_seed(0)
    transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        num_labels=4)).save_pretrained(tmp_path / "vit")
    transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=4)
    ).save_pretrained(tmp_path / "resnet")
    transformers.ConvNextForImageClassification(transformers.ConvNextConfig(
        hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2, num_labels=4)
    ).save_pretrained(tmp_path / "next")
    data = TensorSet(image=torch.randn(8, 3, 32, 32), label=torch.arange(8) % 4)
    for big, small in (("vit", "resnet"), ("resnet", "vit"), ("next", "resnet")):
        teacher, student = (resolve_model(f"hf:{tmp_path / name}", Classifier) for name in (big, small))
        was, before = weights(teacher), weights(student)
        distill(teacher, student, data, Config(steps=1, batch=4), Run(quiet=True))
        assert torch.equal(weights(teacher), was) and not torch.equal(weights(student), before)
