import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.measures.divergences import signed_cross_entropy
from stillhouse.parts.heads import last_linear
from stillhouse.recipes.mixed_targets import mixed_target
from stillhouse.recipes.softmax_regression import softmax_regression
from stillhouse.run import Run
from stillhouse.systems.compression import sd_label_noise as system
from stillhouse.systems.compression.sd_label_noise import Config, distill
from stillhouse.testing import check_system


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def trained(run=None, **changes):
    given = system.tiny()
    config = dataclasses.replace(given.pop("config"), **{k: v for k, v in changes.items() if k not in given})
    given.update({k: v for k, v in changes.items() if k in given})
    return distill(**given, config=config, run=run or Run(quiet=True))


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("xi", [-0.5, 0.0, 0.7, 1.0, 1.7, 3.0])
def test_the_gradient_of_the_combined_loss_is_q_minus_the_target(xi):
    z, q = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    label = torch.arange(5) % 4
    target = mixed_target(label, z, xi, 4)
    assert torch.allclose(target.sum(1), torch.ones(5, dtype=torch.float64), atol=1e-14)
    q.requires_grad_()
    signed_cross_entropy(target, q, reduction="sum").backward()
    assert torch.allclose(q.grad, q.detach().softmax(-1) - target, atol=1e-14)
    separate = (xi * signed_cross_entropy(z.softmax(-1), q) + (1 - xi) * F.cross_entropy(q, label))
    assert signed_cross_entropy(target, q).item() == pytest.approx(separate.item(), abs=1e-13)
    assert (target.min() < 0) == (xi > 1 or xi < 0)


# ---------------------------------------------------------------- heads


def test_softmax_regression_is_at_its_only_optimum():
    x = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = mixed_target(torch.arange(40) % 3, x @ torch.randn(5, 3, dtype=torch.float64), 1.6, 3)
    found = softmax_regression(x, target, 0.05)
    assert found.gradient < 1e-6
    elsewhere = softmax_regression(x, target, 0.05, start=found._replace(weight=found.weight + 1))
    assert torch.allclose(found.weight, elsewhere.weight, atol=1e-4)
    from_sklearn = pytest.importorskip("sklearn.linear_model").LogisticRegression(C=1 / (0.05 * 40), tol=1e-10,
                                                                                max_iter=5000)
    label = torch.arange(40) % 3
    from_sklearn.fit(x.numpy(), label.numpy())
    ours = softmax_regression(x, F.one_hot(label, 3).double(), 0.05)
    assert torch.allclose(ours.weight, torch.from_numpy(from_sklearn.coef_), atol=1e-4)


def test_xi_0_gives_the_teacher_and_little_regularisation_makes_every_xi_equal():
    student = trained(trained="head", xi=(0.0,), steps=2000, weight_decay=0.01, early_stopping=False)
    head, taught = last_linear(student)[1], last_linear(student.teacher)[1]
    assert torch.allclose(head.weight, taught.weight, atol=1e-5)
    x = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    label = torch.randint(3, (60,), generator=torch.Generator().manual_seed(1))
    gaps = []
    for l2 in (1e-1, 1e-6):
        teacher = softmax_regression(x, mixed_target(label, None, 0.0, 3), l2)
        pupil = softmax_regression(x, mixed_target(label, teacher.logits(x), 1.5, 3), l2, start=teacher)
        gaps.append((pupil.logits(x).softmax(-1) - teacher.logits(x).softmax(-1)).abs().max().item())
    assert gaps[1] < 1e-4 < 1e-2 < gaps[0]


def test_a_head_is_fitted_on_features_that_stay_as_they_are():
    fixed = system.tiny()["network"]()

    def network():
        import copy

        return copy.deepcopy(fixed)

    student = trained(network=network, trained="head", xi=(1.0, 1.5), steps=300, early_stopping=False)
    assert torch.equal(student[1].weight, fixed[1].weight) and not torch.equal(student[3].weight, fixed[3].weight)
    assert set(student.scores) == {1.0, 1.5} and student.xi == max(student.scores, key=student.scores.get)


# ---------------------------------------------------------------- networks


def test_the_best_xi_on_validation_is_returned_with_its_teacher():
    run = Run(quiet=True)
    student = trained(run)
    assert student.xi in (0.5, 1.5) and set(student.scores) == {0.5, 1.5} and isinstance(student.teacher, nn.Module)
    assert not any(name.startswith("teacher") for name in student.state_dict())
    assert sum("k" in line for line in run.history) == 10
    assert run.history[-1]["xi"] == student.xi


def test_students_share_start_and_batches_and_xi_1_reads_no_labels():
    given = system.tiny()
    config = dataclasses.replace(given["config"], xi=(1.0, 0.5), early_stopping=False)
    made = system.networks(given["network"], given["labelled"], None, config, Run(quiet=True).begin())[1]
    again = system.networks(given["network"], given["labelled"], None, config, Run(quiet=True).begin())[1]
    assert same(made[1.0], again[1.0]) and not same(made[1.0], made[0.5])


@pytest.mark.parametrize("changes", [{"trained": "head", "early_stopping": False, "steps": 60},
                                     {"xi": (1.2,), "early_stopping": False, "validation": None, "optimizer": "adam"}])
def test_the_contract(changes):
    def inputs():
        given = system.tiny()
        fields = {k: v for k, v in changes.items() if k not in given}
        given.update({k: v for k, v in changes.items() if k in given})
        return {**given, "config": dataclasses.replace(given["config"], **fields)}

    check_system(distill, inputs)


def test_bad_input_is_refused():
    with pytest.raises(RoleError, match="need validation"):
        trained(validation=None)
    with pytest.raises(RoleError, match="labels lie between 0 and 3"):
        trained(labelled=TensorSet(image=torch.randn(8, 1, 4, 4), label=torch.arange(8) % 4))
    with pytest.raises(RoleError, match="does not give its logits"):
        trained(trained="head", early_stopping=False,
                network=lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Softplus()))
    for wrong in ({"xi": ()}, {"xi": (1.0, 1.0)}, {"trained": "body"}, {"weight_decay": 0.0}):
        with pytest.raises(ConfigError):
            Config(**wrong)
    with pytest.raises(ConfigError, match="l2 must be above 0"):
        softmax_regression(torch.ones(2, 1), torch.eye(2), 0.0)
    with pytest.raises(DataError, match="must add up to 1"):
        softmax_regression(torch.ones(2, 1), 2 * torch.eye(2), 0.1)


def test_it_fits_the_head_of_a_pretrained_resnet_from_the_command_line(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    import stillhouse
    from stillhouse.cli import main

    torch.manual_seed(0)
    transformers.ResNetForImageClassification(transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=10,
    )).save_pretrained(tmp_path / "resnet")
    monkeypatch.chdir(tmp_path)
    main(["run", "sd-label-noise", "--network", "hf:resnet", "--labelled", "digits16:labelled", "--validation",
          "digits16:test", "--quiet", "--out", "done", "--config.steps", "60", "--config.xi", "1", "1.5",
          "--config.trained", "head"])
    assert "stillhouse.load('done')" in capsys.readouterr().out
    model = stillhouse.load("done")
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 10)
