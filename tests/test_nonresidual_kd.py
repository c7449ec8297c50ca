import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stillhouse
from stillhouse.data.sets import TensorSet
from stillhouse.deploy import targets
from stillhouse.errors import ConfigError, DamagedFileError, DataError, RoleError, StoreError
from stillhouse.evaluate.landscape import (
    block_alignment,
    feature_reuse,
    filter_normalised,
    gradient_flow,
    hessian_product,
    largest_curvature,
    loss_plane,
    plane_figure,
    roughness,
    sharpness,
)
from stillhouse.hub.models import resolve_model
from stillhouse.measures.divergences import kl
from stillhouse.models.convnets import SmallResNet, TinyConvNet
from stillhouse.parts.shortcuts import (
    Block,
    PlainNetwork,
    remove_shortcuts,
    residual_blocks,
    with_shortcuts,
    without_shortcuts,
)
from stillhouse.protocols import Classifier
from stillhouse.run import Run
from stillhouse.systems.compression import nonresidual_kd
from stillhouse.systems.compression.nonresidual_kd import Config, distill, network

D = torch.float64


class TorchvisionBlock(nn.Module):
    """A residual block as torchvision writes it (BasicBlock with two convolutions, Bottleneck with three)."""

    def __init__(self, inplanes, planes, stride=1, bottleneck=False):
        super().__init__()
        out = 4 * planes if bottleneck else planes
        shapes = ([(inplanes, planes, 1, 1), (planes, planes, 3, stride), (planes, out, 1, 1)] if bottleneck
                  else [(inplanes, planes, 3, stride), (planes, planes, 3, 1)])
        for i, (a, b, k, s) in enumerate(shapes, start=1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, k, s, k // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != out:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.count = len(shapes)

    def forward(self, x):
        identity, out = x, x
        for i in range(1, self.count + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            out = self.relu(out) if i < self.count else out
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class TorchvisionResNet(nn.Module):
    """The layout of torchvision's ResNet-18, -34 and -50."""

    def __init__(self, layers, bottleneck=False, base=64, classes=1000):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, base, 7, 2, 3, bias=False), nn.BatchNorm2d(base)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        width = base
        for i, count in enumerate(layers):
            planes, blocks = base * 2**i, []
            for j in range(count):
                blocks.append(TorchvisionBlock(width, planes, 2 if i and not j else 1, bottleneck))
                width = 4 * planes if bottleneck else planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(width, classes)
        self.depth = len(layers)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(self.depth):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


def moved_norms(model):
    """Batch norms with statistics that are not those of a fresh network."""
    torch.manual_seed(7)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return model.eval()


def hf_resnet(kind="basic"):
    transformers = pytest.importorskip("transformers")
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type=kind, num_labels=4))


def trained(**changes):
    given = nonresidual_kd.tiny()
    given.update(changes)
    return distill(**given, run=Run(quiet=True))


def changed(**fields):
    return dataclasses.replace(nonresidual_kd.tiny()["config"], **fields)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def count(model):
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- the plain twin


def test_the_twin_of_resnet_18_has_its_parameters_less_the_projections():
    with torch.device("meta"):
        whole = TorchvisionResNet([2, 2, 2, 2])
        deeper, bottlenecks = TorchvisionResNet([3, 4, 6, 3]), TorchvisionResNet([3, 4, 6, 3], bottleneck=True)
    plain = without_shortcuts(whole)
    assert count(whole) == 11_689_512 and count(plain) == 11_689_512 - 173_824
    assert (count(deeper), count(bottlenecks)) == (21_797_672, 25_557_032)
    dropped = [key for key in whole.state_dict() if "downsample" in key]
    assert list(plain.state_dict()) == [key for key in whole.state_dict() if key not in dropped]
    for model in (deeper, bottlenecks):
        projections = sum(p.numel() for name, p in model.named_parameters() if "downsample" in name)
        assert count(without_shortcuts(model)) == count(model) - projections
        assert len(residual_blocks(model)) == 16


@pytest.mark.parametrize("make", [
    lambda: SmallResNet(3, 4, 4, (2, 2)), lambda: TorchvisionResNet([2, 2], base=4, classes=4),
    lambda: TorchvisionResNet([2, 1], bottleneck=True, base=4, classes=4), hf_resnet, lambda: hf_resnet("bottleneck")])
def test_blocks_opened_up_compute_the_same_and_twins_something_else(make):
    model = moved_norms(make())
    before, image = copy.deepcopy(model), torch.randn(3, 3, 32, 32)
    logits = (lambda m: m(image).logits) if hasattr(model, "config") else (lambda m: m(image))
    with torch.no_grad():
        expected = logits(model)
        assert torch.equal(logits(with_shortcuts(model)), expected)
        plain = without_shortcuts(model)
        found = logits(plain)
    assert not torch.allclose(found, expected)
    assert same(model, before) and [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    shortcuts = [key for key in model.state_dict() if key not in plain.state_dict()]
    assert all("skip" in k or "downsample" in k or "shortcut" in k for k in shortcuts)
    assert set(plain.state_dict()) <= set(model.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_where_all_shortcuts_are_identities_they_can_be_put_back_bit_for_bit():
    model = moved_norms(SmallResNet(width=4, blocks=(3,)))
    plain, image = without_shortcuts(model), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert count(plain) == count(model) and list(plain.state_dict()) == list(model.state_dict())
        assert torch.equal(with_shortcuts(plain)(image), model(image)) and not torch.equal(plain(image), model(image))
    mixed = without_shortcuts(SmallResNet(width=4, blocks=(1, 2)))
    put_back = [b.shortcut is not None for b in residual_blocks(with_shortcuts(mixed)).values()]
    assert put_back == [True, False, True]


def test_with_all_weights_zero_the_residual_block_is_relu_and_the_plain_block_0():
    model = SmallResNet(width=4, blocks=(1,)).eval()
    (name,) = residual_blocks(model)
    for p in model.get_submodule(name).parameters():
        nn.init.zeros_(p)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.get_submodule(name)(x), x.relu())
        assert without_shortcuts(model).get_submodule(name)(x).abs().max() == 0


def test_what_has_no_residual_block_is_refused():
    with pytest.raises(RoleError, match="no residual block"):
        without_shortcuts(TinyConvNet())
    run = Run(quiet=True)
    with pytest.raises(RoleError, match="no residual block"):
        distill(**{**nonresidual_kd.tiny(), "student": TinyConvNet(classes=4)}, run=run)
    assert not run.begun
    model = SmallResNet(width=2, blocks=(1, 1))
    assert remove_shortcuts(model) == ["body.1", "body.2"] and remove_shortcuts(model) == []
    assert remove_shortcuts(opened := with_shortcuts(SmallResNet(width=2, blocks=(1, 1)))) == ["body.1", "body.2"]
    assert all(b.shortcut is None for b in residual_blocks(opened).values())


# ---------------------------------------------------------------- the system


def test_alpha_0_is_the_plain_network_on_labels():
    given = nonresidual_kd.tiny()
    student = without_shortcuts(given["student"]).train()
    config = changed(alpha=0.0, batch=12, warmup=0.0, steps=2)
    found = trained(config=config, teacher=given["teacher"])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    data = given["labelled"]
    for lr in (0.1, 0.05):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        F.cross_entropy(student(data.image), data.label).backward()
        optimizer.step()
    for a, b in zip(found.model.parameters(), student.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    class Silent(nn.Module):
        def forward(self, image):
            calls.append(len(image))
            return torch.zeros(len(image), 4)

    calls = []
    trained(config=config, teacher=Silent())
    assert calls == [4]


def test_at_tau_1_and_alpha_1_the_gradient_is_q_less_p():
    z_t = torch.randn(5, 4, dtype=D)
    z_s = torch.randn(5, 4, dtype=D, requires_grad=True)
    kl(z_t, z_s, 1.0).backward()
    assert torch.allclose(5 * z_s.grad, z_s.detach().softmax(1) - z_t.softmax(1), atol=1e-14)
    given = nonresidual_kd.tiny()
    base = trained(config=changed(alpha=1.0, tau=1.0))
    other = trained(config=changed(alpha=1.0, tau=1.0), labelled=given["labelled"].with_fields(
        label=given["labelled"].label.flip(0)))
    assert same(base, other)


def test_every_setting_does_something_and_the_shortcuts_are_gone():
    base = trained()
    assert base.blocks == ["body.1", "body.2"] and all(isinstance(base.model.body[i], Block) for i in (1, 2))
    for fields in ({"alpha": 0.0}, {"alpha": 0.5}, {"tau": 1.0}, {"clip": 0.01}):
        assert not same(trained(config=changed(**fields)), base), fields
    kept = trained(config=changed(shortcuts="kept"))
    assert kept.blocks == [] and len(kept.state_dict()) > len(base.state_dict())
    for fields in ({"alpha": 1.1}, {"tau": 0.0}, {"shortcuts": "some"}, {"clip": 0.0}, {"lr": 0.0}):
        with pytest.raises(ConfigError):
            Config(**fields)


@pytest.mark.parametrize("shortcuts", ["removed", "kept"])
def test_the_result_is_read_back(shortcuts, tmp_path):
    result = trained(config=changed(shortcuts=shortcuts)).eval()
    result.save(tmp_path)
    loaded = PlainNetwork.load(tmp_path, SmallResNet(1, 4, 2, (1, 1), norm="group"))
    image = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(image), result(image)) and loaded.blocks == result.blocks
    with pytest.raises(StoreError):
        PlainNetwork.load(tmp_path, SmallResNet(1, 4, 2, (1, 1, 1), norm="group"))
    (tmp_path / "plain.json").write_text("[]")
    with pytest.raises(DamagedFileError):
        PlainNetwork.load(tmp_path, SmallResNet(1, 4, 2, (1, 1), norm="group"))


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_resnet_of_transformers_loses_its_shortcuts_and_is_loaded_back(kind, tmp_path):
    torch.manual_seed(0)
    hf_resnet(kind).save_pretrained(tmp_path / "resnet")
    roles = {role: resolve_model(f"hf:{tmp_path / 'resnet'}", Classifier) for role in ("teacher", "student")}
    roles["labelled"] = TensorSet(image=2 * torch.rand(8, 3, 32, 32) - 1, label=torch.arange(8) % 4)
    config = Config(steps=2, batch=4)
    about = targets.about_run("nonresidual-kd", roles, config)
    before = count(roles["student"])
    result = distill(**roles, config=config, run=Run(quiet=True)).eval()
    assert len(result.blocks) == 4 and count(result) < before == count(roles["teacher"])
    targets.save(result, tmp_path / "saved", about)
    loaded = stillhouse.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(roles["labelled"].image), result(roles["labelled"].image))


def test_the_table_of_trainees_and_mentors():
    results = {"8, plain": {"accuracy": 0.8}, "8, plain, mentor": {"accuracy": 0.85, "teacher accuracy": 0.75},
               "8, residual": {"accuracy": 0.9}, "14, plain, mentor": {"accuracy": 0.7, "teacher accuracy": 0.9}}
    ((arm, lead, gain),) = nonresidual_kd.trainee_and_mentor(results)
    assert arm == "8, plain, mentor" and lead == pytest.approx(-0.05) and gain == pytest.approx(0.05)
    assert len(nonresidual_kd.overview(results).axes) == 2


def test_the_depths_are_what_they_are_called():
    for depth in (8, 14, 26):
        layers = [m for name, m in without_shortcuts(network(depth)).named_modules()
                  if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(layers) == depth


# ---------------------------------------------------------------- the loss around a solution


def quadratic():
    """L = 1/2 w' A w with known curvature, at w."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=D))[0]
    a = turn @ torch.diag(torch.tensor([5.0, 3, 2, 1, 0.5, -7], dtype=D)) @ turn.T
    w = torch.randn(2, 3, dtype=D, requires_grad=True)
    return a, w, lambda: 0.5 * w.flatten() @ a @ w.flatten()


def test_directions_have_the_norm_of_each_filter():
    model = SmallResNet(width=4, blocks=(1, 1))
    for p, d in zip(model.parameters(), filter_normalised(list(model.parameters()), seed=1), strict=True):
        if p.dim() < 2:
            assert d.abs().max() == 0
        else:
            assert torch.allclose(d.flatten(1).norm(dim=1), p.flatten(1).norm(dim=1), rtol=1e-5)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.body[0][0].weight.mul_(3)
    a, b = (filter_normalised(list(m.parameters()), seed=1)[0] for m in (model, scaled))
    assert torch.allclose(3 * a, b, rtol=1e-5)


def test_a_plane_is_the_loss_at_its_points_and_leaves_the_weights():
    a, w, loss = quadratic()
    before = w.detach().clone()
    plane = loss_plane(loss, [w], radius=0.4, points=5, seed=2)
    first, second = (filter_normalised([w], seed=4 + i)[0] for i in (0, 1))
    for i, s in enumerate((-0.4, -0.2, 0.0, 0.2, 0.4)):
        for j, t in enumerate((-0.4, -0.2, 0.0, 0.2, 0.4)):
            x = (w + s * first + t * second).detach().flatten()
            assert plane[i, j].item() == pytest.approx((0.5 * x @ a @ x).item(), abs=1e-6)
    assert torch.equal(w, before) and plane[2, 2] == loss()
    assert roughness(plane) == pytest.approx((plane - plane[2, 2]).abs().sum().item() / 24)
    assert roughness(torch.ones(3, 3)) == 0
    assert len(plane_figure({"a": plane, "b": plane}).axes) == 2

    def broken():
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError):
        loss_plane(broken, [w])
    assert torch.equal(w, before)
    with pytest.raises(ConfigError, match="odd"):
        loss_plane(loss, [w], points=4)


def test_curvature_of_a_quadratic():
    a, w, loss = quadratic()
    v = torch.randn(2, 3, dtype=D)
    assert torch.allclose(hessian_product(loss, [w], [v])[0].flatten(), a @ v.flatten(), atol=1e-12)
    value, vector = largest_curvature(loss, [w], iterations=300, tolerance=1e-12)
    assert value == pytest.approx(-7, abs=1e-6)
    assert torch.allclose(a @ vector[0].flatten(), -7 * vector[0].flatten(), atol=1e-3)
    linear = torch.ones(3, requires_grad=True)
    assert largest_curvature(lambda: linear.sum(), [linear])[0] == 0


def test_sharpness_is_the_rise_along_the_gradient():
    a, w, loss = quadratic()
    before = w.detach().clone()
    g = a @ w.detach().flatten()
    x = w.detach().flatten() + 0.1 * g / g.norm()
    assert sharpness(loss, [w], 0.1) == pytest.approx((0.5 * x @ a @ x - loss()).item(), abs=1e-12)
    assert torch.equal(w, before) and w.grad is None
    with torch.no_grad():
        w.zero_()
    assert sharpness(loss, [w]) == 0


def test_gradient_flow_is_each_weights_gradient_over_its_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    found = gradient_flow(lambda: model(x).square().mean(), model)
    model(x).square().mean().backward()
    assert found == pytest.approx({f"{i}.weight": (model[i].weight.grad.norm() / model[i].weight.norm()).item()
                                   for i in (0, 1)})


# ---------------------------------------------------------------- what blocks do


def test_feature_reuse_is_the_ratio_of_the_two_ways():
    model = moved_norms(SmallResNet(width=4, blocks=(1, 1)))
    before = copy.deepcopy(model)
    data = TensorSet(image=torch.randn(7, 1, 8, 8))
    found = feature_reuse(model, data, batch=3)
    x = model.body[0](data.image)
    for name in ("body.1", "body.2"):
        block = model.get_submodule(name)
        new, kept = block.second(block.first(x)), block.skip(x)
        ratio = (new.flatten(1).norm(dim=1) / kept.flatten(1).norm(dim=1)).mean()
        assert found[name] == pytest.approx(ratio.item(), rel=1e-5)
        x = block(x)
    assert same(model, before) and not any(m._forward_pre_hooks for m in model.modules())
    quiet = copy.deepcopy(model)
    for p in quiet.body[1].second.parameters():
        nn.init.zeros_(p)
    assert feature_reuse(quiet, data)["body.1"] == 0
    with pytest.raises(RoleError, match="shortcut"):
        feature_reuse(TinyConvNet(), data)
    with pytest.raises(DataError):
        feature_reuse(model, data.select([]))


def test_alignment_of_neighbouring_blocks():
    model = moved_norms(SmallResNet(width=4, blocks=(3,)))
    data = TensorSet(image=torch.randn(20, 1, 8, 8))
    for p in model.body[2].second.parameters():
        nn.init.zeros_(p)
    for m in model.body[2].second.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.zeros_(m.running_mean)
    found = block_alignment(model, data)
    assert list(found) == ["body.2", "body.3"] and found["body.2"] == pytest.approx(1, abs=1e-9)
    assert found["body.3"] < 0.999
    assert list(block_alignment(without_shortcuts(model), data)) == ["body.2", "body.3"]
    with pytest.raises(RoleError, match="two or more"):
        block_alignment(SmallResNet(width=4, blocks=(1,)), data)
