"""The survey: its leaves, what they need, the choice among them; and the recipes that stand for them."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse import catalog
from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError, StillError, UnknownNameError
from stillhouse.measures.divergences import kl
from stillhouse.measures.feature_maps import attention_transfer, flow_matrix
from stillhouse.measures.relations import graph_distance, rkd_distance, similarity_preserving
from stillhouse.models.convnets import MLP, SmallResNet, TinyConvNet
from stillhouse.models.generators import PictureGenerator
from stillhouse.models.vit import SmallViT
from stillhouse.parts.packed import QuantizedModel
from stillhouse.parts.quantizers import few_bits
from stillhouse.recipes import adversarial, architecture_choice, data_free, kd, lifelong, self_exits
from stillhouse.recipes.leaves import LEAVES, NEEDS, find, select, there_is
from stillhouse.run import Run
from stillhouse.systems.compression.kd_survey import Config, distill, lines, tiny
from stillhouse.testing import check_system

FEW = digits(16, "labelled").select(range(24))
TRAINING = {"steps": 2, "batch": 8, "lr": 0.05, "warmup": 0.0}


def everything():
    torch.manual_seed(0)

    def factory():
        return TinyConvNet(width=2)

    teacher = SmallResNet(width=2)
    return {"student": factory(), "teacher": teacher, "teachers": [teacher, SmallViT(width=8, depth=1)],
            "network": factory, "candidates": [factory, lambda: SmallResNet(width=2)],
            "labelled": FEW.with_fields(other=FEW.image)}


# ------------------------------------------------------------------------- the map and the selector


def test_every_category_of_the_survey_has_a_leaf():
    assert {k for leaf in LEAVES.values() for k in leaf.knowledge} == {"response", "feature", "relation"}
    assert {leaf.scheme for leaf in LEAVES.values()} == set(catalog.SCHEMES)
    assert {a for leaf in LEAVES.values() for a in leaf.algorithms} == set(catalog.ALGORITHMS)
    assert {n for leaf in LEAVES.values() for n in leaf.needs} <= set(NEEDS)


def test_with_everything_given_every_leaf_fits_and_the_cheapest_comes_first():
    fitting, refused = select(there_is(everything(), old=(0,)))
    assert set(fitting) == set(LEAVES) and not refused and fitting[0] == "labels"
    assert [LEAVES[n].passes for n in fitting] == sorted(LEAVES[n].passes for n in fitting)


def test_a_teacher_that_gives_labels_alone_leaves_methods_of_responses_and_labels():
    found = there_is({"student": TinyConvNet(), "labelled": FEW, "teacher": SmallResNet()}, "labels")
    fitting, refused = select(found)
    assert set(fitting) == {"labels", "response", "exits"}
    assert all(LEAVES[name].knowledge[0] == "response" for name in fitting)
    assert refused["hint"] == ("it needs a teacher that gives class probabilities, not labels alone, and "
                               "a teacher whose inner features can be read")


def test_a_callable_that_is_no_module_has_no_features_and_no_gradients():
    teacher = SmallResNet()
    found = there_is({"student": TinyConvNet(), "labelled": FEW, "teacher": lambda x: teacher(x)})
    assert "probabilities" in found and not found & {"features", "gradients"}
    assert {"hint", "data-free", "adversarial"} <= set(select(found)[1])


@pytest.mark.parametrize(("roles", "absent"), [
    ({"labelled": FEW.without("label")}, "labels"), ({"student": MLP(256)}, "stages"), ({}, "answers"),
    ({}, "several teachers"), ({}, "factory"), ({}, "candidates"), ({}, "known classes"), ({}, "second modality")])
def test_what_is_not_there_is_known(roles, absent):
    assert absent not in there_is({"student": TinyConvNet(), "labelled": FEW, **roles})


def test_the_leaf_that_lacks_something_is_refused_with_the_reason():
    with pytest.raises(StillError, match="'several' does not fit: it needs a teacher that gives class probabilities.*"
                                         "two teachers or more. What fits: labels"):
        distill(TinyConvNet(), FEW, config=Config(leaf="several", **TRAINING))
    with pytest.raises(DataError, match="chooses by validation pictures"):
        distill(TinyConvNet(), FEW, config=Config(**TRAINING))
    with pytest.raises(UnknownNameError, match="no leaf 'magic'; choose one of labels"):
        Config(leaf="magic")
    with pytest.raises(ConfigError, match="bits must lie"):
        Config(bits=0)
    with pytest.raises(RoleError, match="a teacher gives"):
        there_is(everything(), "nothing")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(LEAVES))
def test_every_leaf_trains(name):
    roles = everything()
    labelled = roles["labelled"]
    if name == "lifelong":
        roles["labelled"] = labelled.select((labelled.label >= 5).nonzero().flatten())
    made = distill(**roles, config=Config(leaf=name, old=(0, 1, 2, 3, 4) if name == "lifelong" else (), generator=4,
                                          **TRAINING), run=Run(seed=1, quiet=True))
    assert isinstance(made, QuantizedModel if name == "quantized" else nn.Module)
    assert torch.isfinite(made(FEW.image)).all()
    if name not in ("searched",):
        assert (made.model if name == "quantized" else made) is roles["student"]


def test_the_best_leaf_on_the_validation_pictures_is_trained_and_the_table_kept(tmp_path):
    with Run(tmp_path / "run", quiet=True) as run:
        distill(**tiny(), run=run)
    kept = json.loads((tmp_path / "run" / "leaves.json").read_text())
    assert kept["best"] in kept["tried"] and "two teachers or more" in kept["lacking"]["several"]
    scores = {name: row["accuracy"] for name, row in kept["tried"].items()}
    assert scores[kept["best"]] == max(scores.values())
    text = lines(kept["tried"], kept["lacking"])
    assert text[0].split() == ["method", "knowledge", "scheme", "algorithm", "accuracy", "gain"]
    assert len(text) == 1 + len(scores) + len(kept["lacking"])


# ------------------------------------------------------------------------- exact checks


def test_a_high_temperature_matches_centred_logits():
    z_t, z_s = torch.randn(2, 6, 10, dtype=torch.double)
    centred = [(z - z.mean(1, keepdim=True)) for z in (z_t, z_s)]
    limit = (centred[0] - centred[1]).square().sum(1).mean() / (2 * 10)
    torch.testing.assert_close(kl(z_t, z_s, 1e4), limit, rtol=1e-3, atol=0)
    z_s.requires_grad_()
    kl(z_t, z_s).backward()
    torch.testing.assert_close(z_s.grad, (z_s.softmax(1) - z_t.softmax(1)).detach() / 6)


@pytest.mark.parametrize("measure", [attention_transfer, similarity_preserving, rkd_distance, graph_distance])
def test_alike_is_zero_and_scale_does_not_matter(measure):
    x, y = torch.randn(2, 6, 4, 3, 3, dtype=torch.double)
    if measure in (rkd_distance, graph_distance):
        x, y = x.flatten(1), y.flatten(1)
    assert measure(x, x).abs() < 1e-12
    torch.testing.assert_close(measure(x, y), measure(x, 3.5 * y))


@pytest.mark.parametrize("measure", [similarity_preserving, rkd_distance, graph_distance])
def test_relations_do_not_see_rotations(measure):
    x, y = torch.randn(2, 6, 5, dtype=torch.double)
    q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.double)).Q
    torch.testing.assert_close(measure(x, y), measure(x, y @ q))


def test_distances_are_over_their_mean_of_different_pairs_and_have_a_gradient_on_the_diagonal():
    x = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.double, requires_grad=True)
    y = torch.tensor([[0.0], [2.0], [3.0]], dtype=torch.double)
    d, e = ({(0, 1): 1, (0, 2): 3, (1, 2): 2}, {(0, 1): 2, (0, 2): 3, (1, 2): 1})
    gaps = [abs(d[p] / 2 - e[p] / 2) for p in d]
    expected = 2 * sum(0.5 * g * g if g < 1 else g - 0.5 for g in gaps) / 9
    loss = rkd_distance(y, x)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert torch.isfinite(x.grad).all()


def test_the_flow_of_ones_is_ones():
    assert torch.equal(flow_matrix(torch.ones(2, 3, 4, 4), torch.ones(2, 5, 4, 4)), torch.ones(2, 3, 5))


# ------------------------------------------------------------------------- recipes


def test_few_bits_trains_precise_weights_through_coarse_ones():
    torch.manual_seed(0)
    net = TinyConvNet(width=2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    names = list(net.state_dict())
    with few_bits(net, 2, None) as chosen:
        assert len(net.body[0][0].weight.unique()) <= 4 and not any("bias" in n for n in chosen)
        loss = net(FEW.image).square().mean()
        loss.backward()
        assert net.body[0][0].parametrizations.weight.original.grad.abs().sum() > 0
    assert list(net.state_dict()) == names
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items() if k.endswith("weight"))


def test_exits_leave_the_network_as_it_was_built():
    net = TinyConvNet(width=2)
    keys = list(net.state_dict())
    self_exits.train(net, FEW, self_exits.Config(**TRAINING))
    assert list(net.state_dict()) == keys and not any(m._forward_hooks for m in net.modules())
    with pytest.raises(RoleError, match="two stages or more"):
        self_exits.train(MLP(256), FEW, self_exits.Config(**TRAINING))


def test_the_critic_s_gradient_reaches_the_student_reversed():
    torch.manual_seed(0)
    teacher, student = SmallResNet(width=2), TinyConvNet(width=2)
    still = {k: v.clone() for k, v in student.linear.state_dict().items()}
    adversarial.distill(teacher, student, FEW, adversarial.Config(ce=0.0, kd=0.0, weight=0.0, weight_decay=0.0,
                                                                  **TRAINING), Run(seed=0, quiet=True))
    assert all(torch.equal(still[k], v) for k, v in student.linear.state_dict().items())
    trained = student.body[0][0].weight.clone()
    adversarial.distill(teacher, student, FEW, adversarial.Config(ce=0.0, kd=0.0, weight=1.0, **TRAINING))
    assert not torch.equal(trained, student.body[0][0].weight)


def test_without_forgetting_keeps_old_answers_and_splits_the_softmax():
    torch.manual_seed(0)
    new = FEW.select((FEW.label >= 5).nonzero().flatten())
    student = TinyConvNet(width=2)
    config = lifelong.Config(old=(0, 1, 2, 3, 4), **TRAINING)
    head = student.linear.weight.clone()
    lifelong.train(student, new, lifelong.Config(old=(0, 1, 2, 3, 4), weight=0.0, weight_decay=0.0, **TRAINING))
    assert torch.equal(head[:5], student.linear.weight[:5]) and not torch.equal(head[5:], student.linear.weight[5:])
    with pytest.raises(DataError, match="pictures of the old classes"):
        lifelong.train(student, FEW, config)
    with pytest.raises(RoleError, match="old classes"):
        lifelong.train(student, new, lifelong.Config(old=(0, 12), **TRAINING))


def test_the_generator_s_terms():
    logits = torch.full((4, 3), 0.0)
    terms = data_free.generator_terms(logits, torch.full((4, 2), -2.0), data_free.Config())
    assert terms["information"].item() == pytest.approx(-5 * math.log(3))
    assert terms["activation"].item() == pytest.approx(-0.2) and terms["one_hot"].item() == pytest.approx(math.log(3))
    sure = 50 * F.one_hot(torch.arange(3), 3).float()
    assert data_free.generator_terms(sure, torch.zeros(3, 1), data_free.Config())["one_hot"] < 1e-6
    assert PictureGenerator(7, 3, 8, 4)(torch.randn(2, 7)).shape == (2, 3, 8, 8)


def test_data_free_needs_gradients():
    teacher = SmallResNet(width=2)
    config = data_free.Config(shape=(1, 16, 16), width=4, latent=5, **TRAINING)
    with pytest.raises(RoleError, match="needs gradients through its teacher|must be a Classifier"):
        data_free.distill(lambda x: teacher(x), TinyConvNet(width=2), config)

    def inputs():
        torch.manual_seed(0)
        return {"teacher": SmallResNet(width=2), "student": TinyConvNet(width=2), "config": config}

    check_system(data_free.distill, inputs)


@pytest.mark.parametrize(("distil", "config"), [
    (self_exits.train, self_exits.Config(**TRAINING)), (adversarial.distill, adversarial.Config(**TRAINING)),
    (kd.distill, kd.Config(teacher_sees="other", **TRAINING))])
def test_recipes_keep_the_contract(distil, config):
    def inputs():
        torch.manual_seed(0)
        roles = {"student": TinyConvNet(width=2), "labelled": FEW.with_fields(other=FEW.image), "config": config}
        return roles if distil is self_exits.train else {**roles, "teacher": SmallResNet(width=2)}

    check_system(distil, inputs)


def test_a_teacher_of_another_modality_is_checked_on_what_it_sees():
    colour = TensorSet(image=FEW.image, label=FEW.label, other=FEW.image.expand(-1, 3, -1, -1))
    config = kd.Config(teacher_sees="other", **TRAINING)
    assert kd.distill(SmallResNet(3, width=2), TinyConvNet(width=2), colour, config)
    with pytest.raises(RoleError, match="teacher"):
        kd.distill(SmallResNet(1, width=2), TinyConvNet(width=2), colour, config)
    with pytest.raises(RoleError, match="teacher has 4, student has 10"):
        kd.distill(SmallResNet(3, classes=4, width=2), TinyConvNet(width=2), colour, config)


def test_an_untrained_twin_of_the_teacher_scores_best_and_no_trained_weight_is_read():
    torch.manual_seed(0)
    teacher = SmallResNet(width=2)
    factories = [lambda: TinyConvNet(width=2), lambda: SmallResNet(width=2)]
    scores = architecture_choice.relation_scores(teacher, [TinyConvNet(width=2), teacher], FEW.image)
    assert scores[1].abs() < 1e-10 and scores[0] < -1e-6
    best, first = architecture_choice.choose(teacher, factories, FEW.image)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(1.0)
    assert architecture_choice.choose(teacher, factories, FEW.image)[1].tolist() == first.tolist() and best in (0, 1)
    assert find("searched").algorithms == ("nas",)
