import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, RoleError
from stillhouse.measures.ridge import optimal_alpha
from stillhouse.recipes import mixed_targets
from stillhouse.run import Run
from stillhouse.systems.compression import guided_self_distillation as system
from stillhouse.systems.compression.guided_self_distillation import Config, distill, grid_search
from stillhouse.testing import check_system


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def trained(run=None, **changes):
    given = system.tiny()
    config = dataclasses.replace(given.pop("config"), **{k: v for k, v in changes.items() if k not in given})
    given.update({k: v for k, v in changes.items() if k in given})
    return distill(**given, config=config, run=run or Run(quiet=True))


def test_a_mixed_target_is_the_weighted_loss_up_to_a_constant():
    z, logits = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    label, y = torch.arange(6) % 3, F.one_hot(torch.arange(6) % 3, 3).double()
    for alpha in (-0.5, 0.0, 0.3, 1.0):
        gradients = []
        for loss in (lambda q, a=alpha: mixed_targets.squared_error(mixed_targets.mixed_target(label, z, 1 - a, 3), q),
                     lambda q, a=alpha: a * mixed_targets.squared_error(y, q)
                     + (1 - a) * mixed_targets.squared_error(z.softmax(-1), q)):
            leaf = logits.clone().requires_grad_()
            loss(leaf).backward()
            gradients.append(leaf.grad)
        assert torch.allclose(*gradients, atol=1e-15)


def test_every_round_starts_afresh_and_the_alphas_are_kept():
    made, starts, fresh = [], [], system.tiny()["network"]

    def noted():
        made.append(fresh())
        starts.append(made[-1][1].weight.detach().clone())
        return made[-1]

    student = trained(network=noted, alpha=(0.3, 0.6), rounds=3, validation=None)
    assert student.alphas == (0.3, 0.6) and student is made[-1]
    assert len(starts) == 4 and len({w.sum().item() for w in starts[1:]}) == 3


def test_the_estimate_is_the_formula_on_the_two_networks():
    given = system.tiny()
    validation, run = given["validation"], Run(quiet=True)
    f_y, before = given["network"](), given["network"]()
    kept = []

    def network():
        kept.append(given["network"]())
        return kept[-1]

    alpha = system.estimate(f_y, before, network, given["labelled"], validation, mixed_targets.Config(3, 8), run)
    f_d = kept[0].eval()
    with torch.no_grad():
        p_y, p_d = (f.eval()(validation.image).softmax(-1) for f in (f_y, f_d))
    expected = optimal_alpha(F.one_hot(validation.label, 3).float(), p_y, p_d)
    assert alpha == pytest.approx(float(expected), rel=1e-4)
    student = trained()
    assert len(student.alphas) == 2 and all(map(torch.isfinite, torch.tensor(student.alphas)))


def test_alpha_1_reads_no_teacher_and_alpha_0_no_labels():
    given = system.tiny()
    other = given["labelled"].with_fields(label=given["labelled"].label.flip(0))
    net = given["network"]
    teacher = net()
    config = mixed_targets.Config(4, 8, loss="squared")
    results = []
    one = given["labelled"]
    for data, weight, taught in ((one, 1.0, teacher), (other, 1.0, teacher), (one, 0.0, None), (one, 0.0, teacher)):
        torch.manual_seed(1)
        results.append(mixed_targets.train("train", net(), data, taught, weight, config, Run(quiet=True)))
    assert same(results[0], results[1]) and same(results[2], results[3]) and not same(results[0], results[2])


def test_the_grid_shares_teacher_start_and_batches():
    given = system.tiny()
    args = given["network"], given["labelled"], given["validation"], dataclasses.replace(given["config"], steps=12)
    best, errors = grid_search(*args, Run(quiet=True), grid=(0.0, 1.0))
    assert list(errors) == [0.0, 1.0] and isinstance(best, nn.Module)
    again, alone = grid_search(*args, Run(quiet=True), grid=(0.0, 1.0))
    assert alone == errors and same(best, again)


def test_steps_are_shared_by_all_networks():
    config = Config(steps=11, rounds=3)
    assert config.networks == 5 and sum(c.steps for c in system.shares(config)) == 11
    assert dataclasses.replace(config, alpha=(0.5,)).networks == 3 and Config(rounds=1).networks == 1
    run = Run(quiet=True)
    trained(run)
    assert sum("k" in line for line in run.history) == 10


@pytest.mark.parametrize("changes", [{"alpha": (0.4,), "validation": None}, {"loss": "ce", "optimizer": "sgd"},
                                     {"rounds": 1, "schedule": "cosine", "warmup": 0.5}])
def test_the_contract(changes):
    def inputs():
        given = system.tiny()
        fields = {k: v for k, v in changes.items() if k not in given}
        given.update({k: v for k, v in changes.items() if k in given})
        return {**given, "config": dataclasses.replace(given["config"], steps=6, **fields)}

    check_system(distill, inputs)


def test_bad_input_is_refused():
    with pytest.raises(RoleError, match="give validation, or alpha"):
        trained(validation=None)
    with pytest.raises(RoleError, match="labels lie between 0 and 3"):
        trained(labelled=TensorSet(image=torch.randn(8, 1, 4, 4), label=torch.arange(8) % 4))
    for wrong in ({"rounds": 0}, {"alpha": ()}, {"alpha": (float("nan"),)}, {"loss": "l1"}, {"optimizer": "lars"}):
        with pytest.raises(ConfigError):
            Config(**wrong)


def test_it_runs_from_the_command_line_on_a_resnet_of_transformers(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    import stillhouse
    from stillhouse.cli import main

    transformers.ResNetForImageClassification(transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=10,
    )).save_pretrained(tmp_path / "resnet")
    monkeypatch.chdir(tmp_path)
    main(["run", "guided-self-distillation", "--network", "hf:resnet:fresh=true", "--labelled", "digits16:labelled",
          "--validation", "digits16:test", "--quiet", "--out", "done", "--config.steps", "3", "--config.rounds", "2",
          "--config.batch", "8"])
    assert "stillhouse.load('done')" in capsys.readouterr().out
    assert stillhouse.load("done")(torch.rand(2, 1, 16, 16)).shape == (2, 10)
