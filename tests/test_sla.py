import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stillhouse
from stillhouse.data.sets import TensorSet
from stillhouse.data.transformations import TRANSFORMATIONS, Transformation, copies, transformations
from stillhouse.data.upright import OUTLINES, upright
from stillhouse.deploy import targets
from stillhouse.errors import ConfigError, DamagedFileError, DataError, RoleError, StoreError, UnknownNameError
from stillhouse.evaluate.classification import accuracy
from stillhouse.hub.models import resolve_model
from stillhouse.measures.joint_labels import aggregated_logits, conditional_logits, copy_labels, joint_labels
from stillhouse.models.convnets import SmallResNet, TinyConvNet
from stillhouse.models.label_augmented import FILE, LabelAugmented, label_augmented
from stillhouse.models.vit import SmallViT
from stillhouse.protocols import Classifier
from stillhouse.recipes import transformed
from stillhouse.run import Run
from stillhouse.systems.compression import sla
from stillhouse.systems.compression.sla import Config, distill, terms


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def trained(**changes):
    return distill(**{**sla.tiny(), **changes}, run=Run(quiet=True))


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---------------------------------------------------------------- transformations


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_the_first_is_the_identity_and_all_are_undone_bit_for_bit(name):
    x = torch.randn(3, 3, 6, 6)
    chosen = transformations(name)
    assert torch.equal(chosen[0](x), x) and len(set(chosen)) == len(chosen)
    views = [t(x) for t in chosen]
    for t, view in zip(chosen, views, strict=True):
        assert torch.equal(t.inverse()(view), x) and torch.equal(t(t.inverse()(x)), x)
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_how_many_there_are_and_after_how_many_times_they_are_the_identity():
    sizes = {name: len(chosen) for name, chosen in TRANSFORMATIONS.items()}
    assert list(sizes.values()) == [1, 4, 2, 3, 6, 12, 24]
    x = torch.randn(2, 3, 5, 5)
    for name, order in (("rotations", 4), ("colour cycles", 3), ("rotations and colour cycles", 12)):
        for t in transformations(name):
            y = x
            for _ in range(order):
                y = t(y)
            assert torch.equal(y, x)


def test_copies_of_a_picture_lie_side_by_side():
    x = torch.randn(5, 3, 4, 4)
    chosen = transformations("rotations and colour cycles")
    whole = copies(x, chosen)
    assert whole.shape == (60, 3, 4, 4)
    for j, t in enumerate(chosen):
        assert torch.equal(whole[j::12], t(x))
    label = torch.tensor([3, 1, 0, 2, 3])
    y, j = copy_labels(label, 12)
    assert torch.equal(joint_labels(label, 12), y * 12 + j)
    assert torch.equal(y[5::12], label) and (j[5::12] == 5).all()


def test_pictures_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="square"):
        copies(torch.zeros(1, 3, 4, 5), transformations("rotations"))
    assert copies(torch.zeros(1, 3, 4, 5), transformations("half turns")).shape == (2, 3, 4, 5)
    with pytest.raises(DataError, match="channels are permuted"):
        copies(torch.zeros(1, 1, 4, 4), transformations("colour cycles"))
    with pytest.raises(UnknownNameError, match="rotations"):
        transformations("flips")


def test_a_quarter_turn_is_torchs():
    x = torch.arange(4.0).view(1, 1, 2, 2)
    assert Transformation(1)(x).flatten().tolist() == [1.0, 3.0, 0.0, 2.0]


# ---------------------------------------------------------------- joint labels


def test_of_each_copy_only_its_own_columns_are_read():
    n, classes, count = 2, 5, 4
    for true in range(classes):
        joint = torch.full((n, count, classes, count), 0.0)
        for j in range(count):
            joint[:, j, true, j] = 1.0
        s = aggregated_logits(joint.view(n * count, classes * count), count)
        assert torch.equal(s, F.one_hot(torch.tensor([true, true]), classes).float())
    elsewhere = joint.clone()
    for j in range(count):
        elsewhere[:, j, :, [i for i in range(count) if i != j]] = draw(1).item()
    assert torch.equal(aggregated_logits(elsewhere.view(n * count, -1), count), s)


def test_the_aggregate_is_the_mean_over_copies_of_conditional_logits():
    joint = draw(12, 15)
    mean = torch.stack([conditional_logits(joint[j::3], 3, j) for j in range(3)]).mean(0)
    assert torch.allclose(aggregated_logits(joint, 3), mean, atol=1e-15)
    log_joint = joint.log_softmax(1).view(12, 5, 3)
    given = log_joint - log_joint.logsumexp(1, keepdim=True)
    assert torch.allclose(conditional_logits(joint, 3, 2).log_softmax(1), given[:, :, 2], atol=1e-14)


@pytest.mark.unchecked
def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="columns"):
        conditional_logits(torch.zeros(2, 5), 2)
    with pytest.raises(DataError, match="rows"):
        aggregated_logits(torch.zeros(3, 4), 2)


# ---------------------------------------------------------------- the loss


def test_with_one_transformation_it_is_plain_training():
    logits, joint, label = draw(6, 4, seed=1), draw(6, 4, seed=2), torch.arange(6) % 4
    losses = terms(logits, joint, label, 1, Config(transformations="none"))
    assert torch.equal(losses["sla"], F.cross_entropy(joint, label))
    assert torch.equal(aggregated_logits(joint, 1), conditional_logits(joint, 1)) and torch.equal(
        aggregated_logits(joint, 1), joint)
    p = joint.softmax(1)
    known = (p * (p.log() - logits.log_softmax(1))).sum(1).mean()
    assert torch.allclose(losses["aggregate"], known, atol=1e-14)


def test_the_terms_are_what_they_say():
    logits, joint, label = draw(3, 4, seed=1), draw(9, 12, seed=2), torch.tensor([2, 0, 3])
    config = Config(transformations="colour cycles", sla=2.0, alpha=0.7, beta=0.3, temperature=4.0)
    losses = terms(logits, joint, label, 3, config)
    own = -torch.stack([joint.log_softmax(1)[3 * i + j, 3 * label[i] + j] for i in range(3) for j in range(3)]).mean()
    assert torch.allclose(losses["sla"], 2.0 * own)
    s = torch.stack([torch.stack([joint[3 * i + j, 3 * y + j] for j in range(3)]).mean()
                     for i in range(3) for y in range(4)]).view(3, 4)
    p, q = (s / 4).softmax(1), (logits / 4).softmax(1)
    assert torch.allclose(losses["aggregate"], 0.7 * 16 * (p * (p / q).log()).sum(1).mean())
    assert torch.allclose(losses["ce"], 0.3 * F.cross_entropy(logits, label))


def test_self_distillation_gives_the_joint_head_no_gradient():
    given = sla.tiny()
    model = label_augmented(given["student"], given["labelled"].image, "colour cycles")
    logits, joint = model.both(copies(given["labelled"].image, model.transformations))
    losses = terms(logits[::3], joint, given["labelled"].label, 3, given["config"])
    head = [model.joint.weight, model.joint.bias]
    grads = torch.autograd.grad(losses["aggregate"], [*head, model.classifier[3].weight, model.classifier[0].weight],
                                allow_unused=True, retain_graph=True)
    assert grads[0] is None and grads[1] is None and grads[2].abs().sum() > 0 and grads[3].abs().sum() > 0
    grads = torch.autograd.grad(losses["sla"], [*head, model.classifier[3].weight], allow_unused=True)
    assert grads[0].abs().sum() > 0 and grads[2] is None


def test_the_students_own_head_reads_the_first_copy_alone():
    given = sla.tiny()
    model = label_augmented(given["student"].eval(), given["labelled"].image, "rotations").eval()
    logits, _ = model.both(copies(given["labelled"].image, model.transformations))
    assert torch.allclose(logits[::4], given["student"](given["labelled"].image), atol=1e-6)


def test_every_setting_does_something():
    base = flat(trained())
    for changes in ({"sla": 3.0}, {"alpha": 0.0}, {"beta": 0.0}, {"temperature": 1.0}, {"view": 0.0},
                    {"schedule": "cosine"}):
        config = dataclasses.replace(sla.tiny()["config"], **changes)
        assert not torch.allclose(flat(trained(config=config)), base, atol=1e-7), changes
    for name in ("none", "rotations", "rotations and colour permutations"):
        model = trained(config=dataclasses.replace(sla.tiny()["config"], transformations=name))
        assert model.joint.out_features == 4 * len(transformations(name))


# ---------------------------------------------------------------- the result


@pytest.mark.parametrize("inference", ["distilled", "single", "aggregated"])
def test_the_result_answers_in_each_way_and_is_loaded_as_it_was(inference, tmp_path):
    given = sla.tiny()
    model = trained(config=dataclasses.replace(given["config"], inference=inference)).eval()
    x = torch.randn(6, 3, 8, 8)
    ways = {"distilled": model.classifier, "single": model.single, "aggregated": model.aggregated}
    with torch.no_grad():
        assert torch.equal(model(x), ways[inference](x)) and model(x).shape == (6, 4)
        whole = torch.stack([model.joint(nn.Sequential(*model.classifier[:3])(t(x)))[:, j::3]
                             for j, t in enumerate(model.transformations)])
        assert torch.allclose(model.single(x), whole[0], atol=1e-6)
        assert torch.allclose(model.aggregated(x), whole.mean(0), atol=1e-6)
    model.save(tmp_path)
    loaded = LabelAugmented.load(tmp_path, sla.tiny()["student"])
    with torch.no_grad():
        assert not loaded.training and torch.equal(loaded(x), model(x))
    with pytest.raises(StoreError, match="does not have the weights"):
        LabelAugmented.load(tmp_path, nn.Linear(3, 2))
    stillhouse.store.save_tree(tmp_path / FILE, {"weight": torch.zeros(12, 108), "bias": torch.zeros(12)})
    with pytest.raises(DamagedFileError, match="joint head"):
        LabelAugmented.load(tmp_path, sla.tiny()["student"])


def test_a_saved_result_serves_as_a_plain_classifier_too(tmp_path):
    text = "tiny-convnet:channels_in=3,classes=4,width=4"
    student = resolve_model(text, Classifier)
    roles = {"student": student, "labelled": sla.tiny()["labelled"]}
    config = Config(steps=2, batch=4, inference="aggregated")
    model = distill(**roles, config=config, run=Run(quiet=True)).eval()
    targets.save(model, tmp_path, targets.about_run("sla", roles, config))
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(stillhouse.load(tmp_path)(x), model.aggregated(x))
        assert torch.equal(resolve_model(tmp_path, Classifier).eval()(x), model.classifier(x))


def test_students_that_cannot_be_read_are_refused():
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(RoleError, match="last linear layer"):
        label_augmented(nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Tanh()), x, "rotations")
    with pytest.raises(RoleError, match="no linear layer"):
        label_augmented(nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), x, "rotations")
    with pytest.raises(DataError, match="square"):
        trained(labelled=TensorSet(image=torch.randn(4, 3, 8, 9), label=torch.arange(4)),
                student=TinyConvNet(channels_in=3, classes=4), config=Config(steps=1, batch=2))
    for wrong in ({"sla": 0.0}, {"sla": 0.0, "alpha": 0.0, "inference": "single"}, {"alpha": 0.0, "beta": 0.0},
                  {"temperature": 0.0}, {"schedule": "linear"}, {"inference": "both"}):
        with pytest.raises(ConfigError):
            Config(**wrong)


def test_other_networks_and_a_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8,
        num_labels=4)).save_pretrained(tmp_path / "vit")
    transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=4)
    ).save_pretrained(tmp_path / "resnet")
    data = TensorSet(image=torch.randn(8, 3, 16, 16), label=torch.arange(8) % 4)
    for student in (SmallResNet(channels_in=3, classes=4, width=4),
                    SmallViT(channels_in=3, classes=4, width=8, depth=1),
                    *(resolve_model(f"hf:{tmp_path / name}", Classifier) for name in ("vit", "resnet"))):
        before = flat(student)
        model = distill(student, data, Config(steps=1, batch=4, transformations="rotations and colour cycles"),
                        Run(quiet=True))
        assert model.classifier is student and not torch.equal(flat(student), before)
        assert model.eval().aggregated(data.image).shape == (8, 4)


# ---------------------------------------------------------------- baselines and data


def test_the_baselines_learn_what_they_say():
    given = sla.tiny()

    def by(kind, task, weight=1.0):
        student = sla.tiny()["student"]
        config = transformed.Config(steps=2, batch=4, kind=kind, task=task, weight=weight)
        return flat(transformed.train(student, given["labelled"], config, Run(quiet=True)))

    plain, augmented, multi = by("none", "augment"), by("colour cycles", "augment"), by("colour cycles", "multi")
    assert not torch.allclose(plain, augmented) and not torch.allclose(augmented, multi)
    assert torch.allclose(by("colour cycles", "multi", 0.0), augmented, atol=1e-6)
    for wrong in ({"task": "joint"}, {"weight": -1.0}, {"kind": "flips"}):
        with pytest.raises((ConfigError, UnknownNameError)):
            transformed.Config(**wrong)


def test_upright_objects_can_be_told_and_a_funnel_is_a_triangle_upside_down():
    data = upright(64, seed=3, size=16)
    assert torch.equal(data.image, upright(64, seed=3, size=16).image)
    assert torch.bincount(data.label).tolist() == [8] * len(OUTLINES)
    assert data.image.shape == (64, 3, 16, 16) and data.image.abs().max() <= 1
    points = {(x, -y) for x, y in OUTLINES["triangle"]}
    assert points == set(OUTLINES["funnel"])
    with pytest.raises(DataError):
        upright(4, size=4)


def test_on_easy_pictures_all_three_answers_become_right():
    data = upright(64, seed=5, size=12, noise=0.02, turn=0.0)
    config = Config(steps=120, batch=32, optimizer="adamw", lr=0.01, schedule="cosine", transformations="half turns")
    model = distill(TinyConvNet(channels_in=3, classes=8), data, config, Run(quiet=True))
    for way in ("distilled", "single", "aggregated"):
        model.inference = way
        assert accuracy(model, data) > 0.6
