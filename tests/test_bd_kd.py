import copy
import math

import pytest
import torch
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.evaluate import calibration
from stillhouse.evaluate.classification import calibration_error
from stillhouse.measures.balanced import balance, balanced_kl, entropy, surer_than
from stillhouse.measures.divergences import jeffreys, kl
from stillhouse.recipes import mutual
from stillhouse.recipes.mutual import best_of, min_logit
from stillhouse.run import Run
from stillhouse.systems.compression import bd_kd
from stillhouse.systems.compression.bd_kd import Config, balanced, distill
from stillhouse.testing import check_system


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def trained(**changes):
    """The student and the networks that the factory made."""
    given, made = {**bd_kd.tiny(), **changes}, []
    make = given["network"]

    def network():
        made.append(make())
        return made[-1]

    student = distill(**{**given, "network": network if callable(make) else make}, run=Run(quiet=True))
    return student, made


# ---------------------------------------------------------------- the losses


def test_equal_networks_have_no_divergence_and_no_gradient_and_count_as_otherwise():
    z = 3 * normal(20, 6)
    leaf = z.clone().requires_grad_()
    loss = balanced_kl(z, leaf, 2.0, 3.0)
    loss.backward()
    assert abs(loss.item()) < 1e-14 and leaf.grad.abs().max() < 1e-14
    assert not surer_than(z, z).any()
    w, v = balance(z, z, 2.0)
    assert (w == 1).all() and (v == 2).all()


def test_beta_1_is_the_symmetric_divergence_and_its_forward_part_is_mutual_learning():
    p, q = 3 * normal(2, 30, 5, seed=1)
    each = balanced_kl(p, q, 1.0, 3.0, reduction="none")
    assert torch.allclose(each, jeffreys(p, q, 3.0, reduction="none"), atol=1e-13)
    assert torch.allclose(each, 9 * (kl(p / 3, q / 3, reduction="none") + kl(q / 3, p / 3, reduction="none")))
    assert balanced_kl(p, q, 1.0, 3.0, reverse=0.0).item() == kl(p, q, 3.0).item()
    assert balanced_kl(p, q, 1.0, 3.0, forward=0.0).item() == kl(q, p, 3.0).item()


def test_the_surer_student_is_told_to_cover_and_the_flatter_one_to_concentrate():
    sure, flat = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    assert [x.item() for x in balance(sure, flat, 2.0)] == [2.0, 1.0]
    assert [x.item() for x in balance(flat, sure, 2.0)] == [1.0, 2.0]
    assert [x.item() for x in balance(sure, flat, 2.0, gate="opposite")] == [1.0, 2.0]
    assert [x.item() for x in balance(flat, sure, 3.0, normalise=True)] == [0.25, 0.75]
    assert balanced_kl(flat, sure, 2.0).item() == pytest.approx((2 * kl(flat, sure) + kl(sure, flat)).item())
    w, v = balance(sure.clone().requires_grad_(), flat, 2.0)
    assert not w.requires_grad and not v.requires_grad


def test_weights_are_of_each_sample_and_the_entropies_are_tempered_and_in_nats():
    p, q = 3 * normal(2, 40, 5, seed=2)
    w, v = balance(q, p, 2.0, temperature=3.0)
    assert set(w.tolist()) == {1.0, 2.0} and (w + v == 3).all()
    for i in range(40):
        h = [-sum(x * math.log(x) for x in (z[i] / 3).softmax(0).tolist()) for z in (p, q)]
        assert w[i].item() == (2.0 if h[0] > h[1] else 1.0)
    each = w * kl(p, q, 3.0, reduction="none") + v * kl(q, p, 3.0, reduction="none")
    assert torch.allclose(balanced_kl(p, q, 2.0, 3.0), each.mean())
    assert entropy(torch.zeros(4, dtype=torch.float64)).item() == pytest.approx(math.log(4), abs=1e-15)
    assert entropy(torch.tensor([0.0, -torch.inf])).item() == 0


def test_gradients_of_both_directions_in_the_students_logits():
    z_t, z_s = 2 * normal(2, 1, 6, seed=3)
    p, q = z_t.softmax(-1), z_s.softmax(-1)
    reverse = q * ((q / p).log() - kl(z_s, z_t))
    for forward_weight, reverse_weight, expected in ((1.0, 0.0, q - p), (0.0, 1.0, reverse)):
        leaf = z_s.clone().requires_grad_()
        balanced_kl(z_t, leaf, 1.0, forward=forward_weight, reverse=reverse_weight).backward()
        assert torch.allclose(leaf.grad, expected, atol=1e-14)


def test_no_gradient_leaks_into_the_other_network():
    given = bd_kd.tiny()
    small, large = given["student"], given["network"]()
    seen = {}

    def spy(k, logits, label):
        seen[k] = [z.requires_grad for z in logits]
        return {"ce": balanced(logits[1], logits[0], Config()) if k == 0 else kl(logits[0], logits[1])}

    mutual.learn_together([small, large], given["labelled"], spy, Config(steps=1, batch=4), Run(quiet=True).begin())
    assert seen == {0: [True, False], 1: [False, True]}
    x = given["labelled"].image
    z_s, z_t = small(x), large(x)
    balanced(z_t.detach(), z_s, Config()).backward()
    assert all(p.grad is None for p in large.parameters())
    small.zero_grad(set_to_none=True)
    kl(z_s.detach(), z_t).backward()
    assert all(p.grad is None for p in small.parameters())


def test_the_large_networks_loss_is_not_balanced():
    base = {"steps": 3, "batch": 4, "lr": 0.1}
    runs = {beta: trained(config=Config(**base, beta=beta, forward=0.0, reverse=0.0)) for beta in (1.0, 5.0)}
    assert same(runs[1.0][1][0], runs[5.0][1][0])
    free = trained(config=Config(**base, regulariser=0.0))
    other = trained(config=Config(**base, regulariser=0.0, beta=5.0))
    assert same(free[1][0], other[1][0]) and not same(free[0], other[0])


# ---------------------------------------------------------------- learning together


def test_without_the_reverse_term_it_is_deep_mutual_learning():
    config = Config(steps=4, batch=4, lr=0.1, beta=1.0, reverse=0.0, temperature=2.0)
    student, (large,) = trained(config=config)
    given = bd_kd.tiny()
    networks = [given["student"]]
    run = Run(quiet=True).begin()
    networks.append(given["network"]())

    def objective(k, logits, label):
        own, other = logits[k], logits[1 - k]
        return {"ce": nn.functional.cross_entropy(own, label), "kd": kl(other, own, 2.0)}

    mutual.learn_together(networks, given["labelled"], objective, config, run, name="bd-kd")
    assert same(student, networks[0]) and same(large, networks[1])


def test_both_learn_and_each_from_the_other():
    given = bd_kd.tiny()
    start = copy.deepcopy(given["student"])
    student, made = trained()
    assert student is not None and not same(student, start) and len(made) == 2
    apart = {r: trained(config=Config(steps=4, batch=4, lr=0.1, regulariser=r))[1][0] for r in (0.0, 1.0)}
    assert not same(apart[0.0], apart[1.0])


def test_in_turn_differs_and_costs_one_more_pass_of_all_but_the_last():
    class Counting(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, x):
            self.calls += self.training
            return self.inner(x)

    ends = {}
    for update, passes in (("together", [4, 4]), ("in turn", [8, 4])):
        given = bd_kd.tiny()
        networks = [Counting(given["student"]), Counting(given["network"]())]
        mutual.train(networks, given["labelled"], mutual.Config(steps=4, batch=4, update=update), Run(quiet=True))
        assert [n.calls for n in networks] == passes
        ends[update] = networks
    assert not same(ends["together"][1], ends["in turn"][1])


def test_collaborative_targets():
    logits, label = 2 * normal(3, 20, 5, seed=4), torch.arange(20) % 5
    ce = torch.stack([nn.functional.cross_entropy(z, label, reduction="none") for z in logits])
    of_best = nn.functional.cross_entropy(best_of(logits, label), label, reduction="none")
    of_min = nn.functional.cross_entropy(min_logit(logits, label), label, reduction="none")
    assert torch.equal(of_best, ce.amin(0)) and (of_min <= of_best + 1e-12).all()
    assert (min_logit(logits, label)[torch.arange(20), label] == 0).all()
    given = bd_kd.tiny()
    for target in ("best", "min-logit"):
        networks = [given["student"], given["network"]()]
        config = mutual.Config(steps=2, batch=4, lr=0.1, target=target, temperature=2.0)
        assert mutual.train(networks, given["labelled"], config, Run(quiet=True)) == networks


def test_mutual_learning_resumes_exactly():
    def learn(**roles):
        run = roles.pop("run")
        student, other = roles["student"], nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).to(run.device)
        config = mutual.Config(steps=3, batch=4, update="in turn")
        return mutual.train([student, other], roles["labelled"], config, run)[0]

    def inputs():
        given = bd_kd.tiny()
        return {"student": given["student"], "labelled": given["labelled"]}

    def whole(student, labelled, run=None):
        return learn(student=student, labelled=labelled, run=run.begin())

    check_system(whole, inputs)


# ---------------------------------------------------------------- calibration


def test_a_model_as_sure_as_it_is_right_has_no_calibration_error():
    n, right = 100, 70
    labels = torch.cat([torch.zeros(right), torch.ones(n - right)]).long()
    logits = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log().expand(n, 3)
    assert calibration_error(logits, labels) < 1e-12
    diagram = calibration.reliability(logits, labels)
    assert diagram.samples.sum() == n and diagram.accuracy[10] == pytest.approx(0.7)
    assert calibration.negative_log_likelihood(logits, labels) == pytest.approx(-0.7 * math.log(0.7)
                                                                               - 0.3 * math.log(0.2))
    assert calibration.brier(logits, labels) == pytest.approx(0.7 * (0.09 + 0.04 + 0.01) + 0.3 * (0.49 + 0.64 + 0.01))
    assert calibration.brier(torch.zeros(5, 4), torch.zeros(5).long()) == pytest.approx(0.75)


def test_the_reliability_diagram_adds_up_to_the_calibration_error():
    logits, labels = 3 * normal(500, 6, seed=5), torch.arange(500) % 6
    d = calibration.reliability(logits, labels, 15)
    some = d.samples > 0
    ece = (d.samples[some] * (d.accuracy - d.confidence)[some].abs()).sum().item() / 500
    assert ece == pytest.approx(calibration_error(logits, labels), abs=1e-12)
    assert d.accuracy[~some].isnan().all()
    assert calibration.reliability_figure(d, "all").axes
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    other = metrics.multiclass_calibration_error(logits.softmax(-1), labels, num_classes=6, n_bins=15)
    assert other.item() == pytest.approx(ece, abs=1e-6)


def test_the_fitted_temperature_undoes_a_scale_and_changes_no_decision():
    z = 2 * normal(4000, 5, seed=6)
    label = torch.multinomial(z.softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    base = calibration.fit_temperature(z, label)
    assert base == pytest.approx(1, abs=0.05)
    assert calibration.fit_temperature(4 * z, label) == pytest.approx(4 * base, rel=1e-4)
    best = calibration.negative_log_likelihood(z / base, label)
    assert all(best <= calibration.negative_log_likelihood(z / (base * f), label) for f in (0.8, 0.99, 1.01, 1.2))


def test_scores_of_a_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    data = TensorSet(image=torch.randn(30, 1, 2, 2), label=torch.arange(30) % 3)
    plain, soft = calibration.scores(model, data), calibration.scores(model, data, temperature=1e6)
    assert set(plain) == {"accuracy", "ece", "nll", "brier"} and plain["accuracy"] == soft["accuracy"]
    assert soft["nll"] == pytest.approx(math.log(3), abs=1e-4)
    with pytest.raises(DataError, match="labels"):
        calibration.brier(torch.zeros(2, 3), torch.zeros(3).long())


# ---------------------------------------------------------------- errors, contract, real models


def test_wrong_input_is_named_before_any_step():
    for wrong in ({"beta": 0.5}, {"temperature": 0.0}, {"gate": "both"}, {"peers": 0}, {"reverse": -1.0},
                  {"update": "later"}):
        with pytest.raises(ConfigError):
            Config(**wrong)
    with pytest.raises(ConfigError, match="target"):
        mutual.Config(target="all")
    with pytest.raises(RoleError, match="3"):
        trained(network=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    with pytest.raises(RoleError, match="factory"):
        trained(network=None)
    given = bd_kd.tiny()
    with pytest.raises(DataError, match="label"):
        trained(labelled=given["labelled"].without("label"))
    with pytest.raises(RoleError, match="twice"):
        trained(network=lambda: given["student"], student=given["student"])
    with pytest.raises(RoleError, match="at least 2"):
        mutual.train([given["student"]], given["labelled"], run=Run(quiet=True))


def test_the_contract():
    check_system(distill, bd_kd.tiny)


def test_it_runs_on_image_classifiers_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from stillhouse.hub.models import resolve_model
    from stillhouse.protocols import Classifier, Network

    torch.manual_seed(0)
    transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(
        num_channels=1, image_size=16, depth_multiplier=0.1, min_depth=4, first_layer_is_expansion=True,
        finegrained_output=False, num_labels=4)).save_pretrained(tmp_path / "small")
    transformers.ResNetForImageClassification(transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="bottleneck", num_labels=4,
    )).save_pretrained(tmp_path / "large")
    student = resolve_model(f"hf:{tmp_path / 'small'}", Classifier)
    network = resolve_model(f"hf:{tmp_path / 'large'}", Network)
    start = copy.deepcopy(student)
    data = TensorSet(image=torch.randn(8, 1, 16, 16), label=torch.arange(8) % 4)
    out, made = trained(student=student, network=network, labelled=data, config=Config(steps=2, batch=4, lr=0.01))
    assert out is student and not same(student, start) and len(made) == 1
    assert student(data.image).shape == (8, 4)
