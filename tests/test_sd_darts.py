"""SD-DARTS: cells and supernets, snapshots and their vote, the bi-level gradient, flatness, and the search."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.evaluate.landscape import extreme_curvatures, largest_curvature, mean_sharpness
from stillhouse.evaluate.recalibrate import recalibrated
from stillhouse.hub.models import resolve_model
from stillhouse.measures.divergences import kl
from stillhouse.models.cells import (
    DARTS_V2,
    OPERATIONS,
    SPACES,
    CellNet,
    FactorizedReduce,
    Supernet,
    discretise,
    parsed,
    reductions,
)
from stillhouse.parts.ema import EMA
from stillhouse.parts.ensembles import vote_log_probs
from stillhouse.parts.snapshots import Snapshots, listening, traceless
from stillhouse.recipes import cell_training
from stillhouse.recipes.bilevel import unrolled_gradient
from stillhouse.recipes.supervised import optimizer_for
from stillhouse.run import Run, set_lr
from stillhouse.run.schedules import cosine
from stillhouse.systems.compression.sd_darts import Config, checked, distill, perturbation, search, tiny

D = torch.float64
FEW = ("none", "skip_connect", "conv_3x3", "avg_pool_3x3")


def supernet(space="darts", operations=FEW, cells=3, nodes=2, seed=0, **options):
    torch.manual_seed(seed)
    made = Supernet(space, channels_in=1, classes=3, channels=2, cells=cells, nodes=nodes, operations=operations,
                    **options)
    for alpha in made.alpha.values():
        alpha.data.normal_()
    return made


X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 3


# ------------------------------------------------------------------------- cells and networks


def test_a_network_of_paper_size_has_the_papers_parameters():
    network = CellNet(DARTS_V2).eval()
    assert sum(p.numel() for p in network.parameters()) == 3_349_342
    assert network.genotype == DARTS_V2 and len(network.body.layers) == 20
    with torch.no_grad():
        assert network(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert cell_training.auxiliary_head(16, 10).eval()(torch.randn(2, 16, 8, 8)).shape == (2, 10)


def test_the_whole_table_of_operations_is_searched():
    assert set(SPACES["darts"].operations) - {"none"} <= set(OPERATIONS) and len(SPACES["darts"].operations) == 8
    for space in SPACES:
        made = Supernet(space, channels_in=1, channels=2, cells=3)
        assert made(X).shape == (6, 10)
        assert {k: len(a) for k, a in made.alpha.items()} == (
            {"normal": 14, "reduce": 14} if space == "darts" else {"normal": 6})
        assert CellNet(str(made.genotype), space, 1, 10, 2, 3)(X[:, :, :7, :7]).shape == (6, 10)


def test_where_cells_halve_the_picture():
    assert reductions(20) == {6, 13} and reductions(8) == {2, 5} and reductions(3) == {1, 2}
    assert reductions(2) == {1} and reductions(1) == set()


def test_half_the_size_keeps_all_pixels():
    for size in (8, 7):
        reduce = FactorizedReduce(2, 4)
        x = torch.randn(3, 2, size, size, requires_grad=True)
        y = reduce(x)
        assert y.shape == (3, 4, 4, 4)
        nn.init.ones_(reduce.even.weight), nn.init.ones_(reduce.odd.weight)
        reduce.norm = nn.Identity()
        used = torch.autograd.grad(reduce(x.abs()).sum(), x)[0] != 0
        assert used[..., ::2, ::2].all() and used[..., 1::2, 1::2].all()


def test_architectures_have_words():
    assert str(parsed(DARTS_V2)) == DARTS_V2
    text = "skip_connect@0/none@0-conv_3x3@1/avg_pool_3x3@0-conv_1x1@1-none@2"
    assert str(parsed(text, "nas-bench-201")) == text
    network = resolve_model(f"cell-net:genotype={text},space=nas-bench-201,channels_in=1,classes=3,channels=2,cells=3")
    assert network.genotype == text and network(X).shape == (6, 3)
    for wrong, space in (("conv_3x3", "darts"), ("dense@0+dense@0", "darts"), ("conv_3x3@2+conv_3x3@0", "darts"),
                         (text, "darts"), ("", "darts"), ("conv_3x3@0-conv_3x3@0", "nas-bench-201"),
                         ("conv_3x3@0/conv_3x3@0+conv_3x3@0", "darts"), (DARTS_V2, "nas-bench-101")):
        with pytest.raises(ConfigError):
            parsed(wrong, space)
    for options in ({"operations": ("dense",)}, {"operations": ("none",)}, {"channels": 0}, {"space": "nas"}):
        with pytest.raises(ConfigError):
            Supernet(**options)


def test_weights_of_an_edge_sum_to_one_and_a_large_logit_makes_it_its_operation():
    made = supernet(cells=1, nodes=1).double().eval()
    for weights in made.weights().values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights), dtype=D), rtol=0, atol=1e-15)
    for name in ("conv_3x3", "avg_pool_3x3", "skip_connect", "none"):
        made.alpha["normal"].data.zero_()
        made.alpha["normal"].data[:, FEW.index(name)] = 1e3
        cell, stem = made.body.layers[0], made.body.stem(X.double())
        states = [enter(stem) for enter in cell.entry]
        node = sum(torch.zeros_like(s) if name == "none" else cell.edges[0][str(i)][name](s)
                   for i, s in enumerate(states))
        torch.testing.assert_close(made(X.double()), made.body.linear(node.mean((2, 3))), rtol=0, atol=1e-14)


def test_cutting_keeps_two_edges_and_never_none():
    operations = ("none", "skip_connect", "conv_3x3")
    logits = torch.tensor([[9.0, 0.0, 1.0], [0.0, 0.2, 0.1],  # node 0: "none" is strongest on edge 0
                           [0.0, 3.0, 0.0], [0.0, 0.0, 2.0], [9.0, 5.0, 0.0]])  # node 1: edge 2 lost to its "none"
    cell = discretise(logits.softmax(-1), operations, "darts")
    assert [[tuple(e) for e in node] for node in cell] == [[("conv_3x3", 0), ("skip_connect", 1)],
                                                            [("skip_connect", 0), ("conv_3x3", 1)]]
    for seed in range(20):
        for cell in supernet(nodes=4, seed=seed).genotype:
            assert all(len(node) == 2 and len({e.source for e in node}) == 2 for node in cell)
            assert all(e.operation != "none" for node in cell for e in node)
    every = discretise(logits[:3].softmax(-1), operations, "nas-bench-201")
    assert [[tuple(e) for e in node] for node in every] == [[("none", 0)], [("skip_connect", 0), ("skip_connect", 1)]]


@pytest.mark.parametrize(("space", "cells"), [("darts", 4), ("darts", 2), ("nas-bench-201", 3)])
def test_the_cut_network_is_the_supernet_with_the_other_operations_masked(space, cells):
    made = supernet(space, SPACES[space].operations, cells=cells, nodes=3).double()
    genotype = made.genotype
    masks = made.masked(genotype)
    assert sum(m.sum() for m in masks.values()) == str(genotype).count("@")
    if space == "darts":
        assert all(m[:, 0].sum() == 0 for m in masks.values())
    for mode in (True, False):
        made.train(mode)
        cut = made.inherited(genotype)
        torch.testing.assert_close(cut(X.double()), traceless(made, X.double(), masks), rtol=0, atol=1e-13)
        assert cut.training == mode
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in made.parameters())


def test_drop_path_leaves_whole_edges_out_and_scales_the_rest():
    network = CellNet("conv_3x3@0", "nas-bench-201", 1, 3, 2, 1).double()
    cell = network.body.layers[0]
    network.drop_path(0.5)
    x = torch.randn(400, 2, 4, 4, dtype=D)
    whole = cell.edges[0]["0"]["conv_3x3"](x)
    torch.manual_seed(0)
    share = cell(x, x, None) / whole
    kept = share.mean((1, 2, 3))
    torch.testing.assert_close(share, kept[:, None, None, None].expand_as(share))
    assert set(kept.round(decimals=6).tolist()) == {0.0, 2.0} and 0.4 < (kept > 0).double().mean() < 0.6
    assert torch.equal(cell.eval()(x, x, None), cell.edges[0]["0"]["conv_3x3"](x))
    skip = CellNet("skip_connect@0", "nas-bench-201", 1, 3, 2, 1).double()
    skip.drop_path(0.9)
    assert torch.equal(skip.body.layers[0](x, x, None), x)


# ------------------------------------------------------------------------- the past and its vote


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_a_teacher_equal_to_the_supernet_teaches_nothing(norm):
    made = supernet().double().train(norm == "batch")
    past = Snapshots(made, 3, norm)
    for _ in range(3):
        past.push(made)
    z = traceless(made, X.double())
    for temperature in (1.0, 2.0):
        target = temperature * vote_log_probs(past.answers(X.double()), "mean", temperature)
        loss = kl(target, z, temperature)
        gradient = torch.autograd.grad(loss, list(made.parameters()), retain_graph=True)
        assert loss.abs() < 1e-14 and max(g.abs().max() for g in gradient) < 1e-13
    made.alpha["normal"].data += torch.randn_like(made.alpha["normal"])
    assert kl(past.answers(X.double())[0], traceless(made, X.double())) > 1e-9, "a snapshot keeps the alpha of its time"


def test_the_oldest_snapshot_leaves_first():
    made = supernet()
    past = Snapshots(made, 2)
    with pytest.raises(RoleError, match="no snapshot"):
        past.answers(X)
    seen = []
    for k in range(4):
        made.alpha["normal"].data.fill_(k)
        made.alpha["normal"].data[0] = torch.randn(len(FEW))
        past.push(made, float(k))
        seen.append(traceless(listening(made, "batch"), X))
        assert len(past) == min(k + 1, 2)
        assert [float(s) for s in past.scores] == [float(i) for i in range(max(k - 1, 0), k + 1)]
    torch.testing.assert_close(past.answers(X), torch.stack(seen[-2:]), rtol=0, atol=0)
    with pytest.raises(RoleError, match="another module"):
        past.push(nn.Linear(2, 2))


def test_listening_leaves_no_trace():
    made = supernet()
    past = Snapshots(made, 2)
    past.push(made)
    made(X), past.push(made)
    before = [{n: t.clone() for n, t in state.items()} for state in past.kept]
    own = {n: t.clone() for n, t in made.state_dict().items()}
    random = torch.get_rng_state()
    answers = past.answers(X)
    assert not answers.requires_grad and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, b[n]) for state, b in zip(past.kept, before, strict=True) for n, t in state.items())
    assert all(torch.equal(t, own[n]) for n, t in made.state_dict().items())
    assert any("running_mean" in n for n in past.kept[0]) and any(n.startswith("alpha.") for n in past.kept[0])
    assert not torch.equal(before[0]["body.stem.1.running_mean"], before[1]["body.stem.1.running_mean"])
    other = Snapshots(made, 2)
    other.load_state_dict(past.state_dict())
    assert torch.equal(other.answers(X), answers)
    with pytest.raises(RoleError, match="differs"):
        Snapshots(nn.Linear(2, 2), 2).load_state_dict(past.state_dict())


def test_an_average_of_the_past_is_an_ema():
    made, past = supernet(), None
    past, ema = Snapshots(made, 1), EMA(made)
    past.push(made)
    for _ in range(3):
        with torch.no_grad():
            for p in made.parameters():
                p += torch.randn_like(p)
        made(X)
        past.follow(made, 0.8), ema.update(made, 0.8)
    theirs = dict([*ema.module.named_parameters(), *ema.module.named_buffers()])
    assert all(torch.equal(t, theirs[n]) for n, t in past.kept[0].items())
    with pytest.raises(ConfigError):
        past.follow(made, 1.5)


def test_votes():
    z = torch.randn(3, 5, 4, dtype=D)
    same = z[:1].expand(3, -1, -1)
    for rule in ("mean", "weighted"):
        scores = torch.tensor([0.3, 2.0, 1.0])
        torch.testing.assert_close(vote_log_probs(same, rule, 2.0, scores), (z[0] / 2).log_softmax(-1))
    torch.testing.assert_close(vote_log_probs(z, "mean", 2.0).exp(), (z / 2).softmax(-1).mean(0))
    weights = (-scores.double()).softmax(0)
    torch.testing.assert_close(vote_log_probs(z, "weighted", 2.0, scores.double()).exp(),
                               ((z / 2).softmax(-1) * weights[:, None, None]).sum(0))
    votes = torch.tensor([[[1.0, 0, 0]], [[0, 3.0, 2.0]], [[2.0, 0, 1.0]]])
    torch.testing.assert_close(vote_log_probs(votes, "majority").exp(), torch.tensor([[2 / 3, 1 / 3, 0]]))
    student = torch.randn(1, 3, requires_grad=True)
    kl(2 * vote_log_probs(votes, "majority"), student, 2.0).backward()
    assert torch.isfinite(student.grad).all()
    with pytest.raises(ConfigError, match="majority"):
        vote_log_probs(z, "loudest")
    with pytest.raises(RoleError, match="score"):
        vote_log_probs(z, "weighted")


# ------------------------------------------------------------------------- the bi-level gradient


def test_the_second_order_is_the_gradient_through_a_step():
    made = supernet(cells=2).double()
    w = {n: p for n, p in made.named_parameters() if not n.startswith("alpha.")}
    alphas, u, v = list(made.alpha.values()), X.flip(0).double(), Y.flip(0)
    before = {n: t.clone() for n, t in made.state_dict().items()}

    def losses():
        return (lambda s: F.cross_entropy(traceless(made, X.double(), state=s), Y),
                lambda s: F.cross_entropy(traceless(made, u, state=s), v))

    train, validation = losses()
    xi = 0.3
    value, found = unrolled_gradient(train, validation, w, alphas, xi)
    g = torch.autograd.grad(train(w), list(w.values()), create_graph=True)
    through = validation({n: p - xi * d for (n, p), d in zip(w.items(), g, strict=True)})
    expected = torch.autograd.grad(through, alphas)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(value, through.detach())
    first = unrolled_gradient(train, validation, w, alphas, 0.0)[1]
    for a, b, c in zip(first, torch.autograd.grad(validation(w), alphas), found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        assert (a - c).abs().max() > 1e-6
    assert all(torch.equal(t, before[n]) for n, t in made.state_dict().items())
    assert all(p.grad is None for p in made.parameters())


# ------------------------------------------------------------------------- flatness and statistics


def test_eigenvalues_of_largest_size_and_largest_value():
    h = torch.tensor([1.0, -3.0], dtype=D)
    a = torch.zeros(2, dtype=D, requires_grad=True)

    def loss():
        return 0.5 * (h * a * a).sum()

    assert largest_curvature(loss, [a], 200, tolerance=1e-14)[0] == pytest.approx(-3, abs=1e-9)
    assert largest_curvature(loss, [a], 200, tolerance=1e-14, shift=-3.0)[0] == pytest.approx(1, abs=1e-9)
    assert extreme_curvatures(loss, [a], 200, tolerance=1e-14) == pytest.approx((-3, 1), abs=1e-9)
    h = torch.tensor([4.0, -3.0], dtype=D)
    assert extreme_curvatures(loss, [a], 300, tolerance=1e-14) == pytest.approx((4, 4), abs=1e-9)


def test_mean_sharpness_of_a_quadratic_is_half_its_mean_eigenvalue():
    root = torch.randn(2, 3, 6, dtype=D).flatten(0, 1)
    h = root @ root.T - torch.eye(6, dtype=D)
    a = torch.zeros(2, 3, dtype=D, requires_grad=True)
    slope = torch.randn(6, dtype=D)

    def loss():
        return 0.5 * a.flatten() @ h @ a.flatten() + slope @ a.flatten()

    radius = 0.1
    expected = radius**2 / 2 * h.trace().item() / 6
    assert mean_sharpness(loss, [a], radius, directions=4000) == pytest.approx(expected, rel=0.05)
    h = 2 * torch.eye(6, dtype=D)
    assert mean_sharpness(loss, [a], radius, directions=2) == pytest.approx(radius**2, abs=1e-12)
    assert not a.any() and mean_sharpness(loss, [a], radius, 2, 5) == mean_sharpness(loss, [a], radius, 2, 5)
    with pytest.raises(ConfigError, match="radius"):
        mean_sharpness(loss, [a], 0.0)


def test_statistics_are_measured_anew():
    made = supernet().eval()
    data = TensorSet(image=torch.randn(20, 1, 8, 8), label=torch.arange(20) % 3)
    before = {n: t.clone() for n, t in made.state_dict().items()}
    anew = recalibrated(made, data, batch=10)
    inner = copy.deepcopy(made.body.stem)
    halves = torch.stack([inner[0](data.image[i : i + 10]).mean((0, 2, 3)) for i in (0, 10)])
    torch.testing.assert_close(anew.body.stem[1].running_mean, halves.mean(0))
    assert anew.body.stem[1].momentum == 0.1 and not any(m.training for m in anew.modules())
    assert all(torch.equal(t, before[n]) for n, t in made.state_dict().items())
    with pytest.raises(DataError):
        recalibrated(made, data.select([0]))


# ------------------------------------------------------------------------- the search

DATA = digits(8, "labelled").select(range(60))
SMALL = Config(steps=5, search=0.8, batch=16, operations=FEW, nodes=2, cells=2, channels=2, final_cells=2,
               final_channels=2, interval=1, final=cell_training.Config(batch=16, auxiliary=0.0))


def searched(steps=4, **changes):
    config = dataclasses.replace(SMALL, **changes)
    torch.manual_seed(0)
    made = Supernet(channels_in=1, channels=2, cells=2, nodes=2, operations=FEW)
    with Run(quiet=True) as run:
        search(made, DATA.select(range(30)), DATA.select(range(30, 60)), steps, config, run)
    return made.state_dict(), run.history


def same(a, b):
    return all(torch.equal(t, b[n]) for n, t in a.items())


def test_without_teachers_it_is_darts_bit_for_bit():
    torch.manual_seed(0)
    plain = Supernet(channels_in=1, channels=2, cells=2, nodes=2, operations=FEW)
    w = [p for n, p in plain.named_parameters() if not n.startswith("alpha.")]
    optimizer = optimizer_for(w, "sgd", SMALL.lr, SMALL.weight_decay)
    outer = torch.optim.Adam(plain.alpha.parameters(), SMALL.alpha_lr, (0.5, 0.999),
                             weight_decay=SMALL.alpha_weight_decay)
    halves = {"train": DATA.select(range(30)), "validation": DATA.select(range(30, 60))}
    with Run(quiet=True) as run:
        for batch in run.loop("search", halves, batch=dict.fromkeys(halves, 16), steps=4, drop_last=True):
            set_lr(optimizer, SMALL.lr_min + (SMALL.lr - SMALL.lr_min) * cosine(run.progress))
            run.update(outer, val=F.cross_entropy(plain(batch["validation"]["image"]), batch["validation"]["label"]))
            run.update(optimizer, clip=5.0, ce=F.cross_entropy(plain(batch["train"]["image"]),
                                                                batch["train"]["label"]))
    darts = plain.state_dict()
    assert same(darts, searched(weight=0.0)[0])
    assert same(darts, searched(interval=100)[0]), "an empty queue teaches nothing"
    taught, history = searched()
    assert not same(darts, taught)
    assert "kd" not in history[0] and "kd" in history[1] and "validation_kd" not in history[1]


@pytest.mark.parametrize("changes", [
    {"snapshots": 1}, {"vote": "majority"}, {"vote": "weighted"}, {"past": "ema"}, {"alpha_weight": 1.0}, {"order": 2},
    {"perturb": 0.5}, {"norm": "running"}, {"temperature": 1.0}, {"interval": 2}, {"weight": 0.3}])
def test_every_choice_changes_the_search(changes):
    state = searched(**changes)[0]
    assert not same(state, searched()[0])
    assert all(torch.isfinite(t).all() for t in state.values())


def test_noise_on_alpha_is_bounded_and_not_kept():
    made = supernet()
    with Run(quiet=True) as run:
        for _ in run.loop("draw", steps=1):
            noise = perturbation(made, 0.3, run)
    assert all(n.abs().max() <= 0.3 and n.std() > 0.1 for n in noise.values())
    plain = made.weights()
    assert not torch.equal(made.weights(noise)["normal"], plain["normal"])
    assert torch.equal(made.weights()["normal"], plain["normal"])


def test_two_halves_of_the_data_and_what_is_refused():
    with Run(quiet=True) as run:
        train, held_out, shape = checked(DATA, None, SMALL, run)
        seen = torch.cat([train.image, held_out.image]).flatten(1)
        assert len(train) == len(held_out) == 30 and shape == {"channels_in": 1, "classes": 10}
        assert sorted(seen.tolist()) == sorted(DATA.image.flatten(1).tolist())
        gap = DATA.with_fields(label=torch.where(DATA.label == 3, 11, DATA.label))
        with pytest.raises(DataError, match="without gaps"):
            checked(gap, None, SMALL, run)
        with pytest.raises(DataError, match="two or more"):
            checked(TensorSet(image=DATA.image[:1], label=torch.zeros(1, dtype=torch.long)), None, SMALL, run)
    for wrong in ({"search": 2.0}, {"space": "nas"}, {"vote": "loudest"}, {"snapshots": 0}, {"temperature": 0.0},
                  {"perturb": -1.0}, {"order": 3}, {"past": "future"}, {"norm": "layer"}, {"alpha_lr": 0.0}):
        with pytest.raises(ConfigError):
            dataclasses.replace(SMALL, **wrong)
    for wrong in ({"drop_path": 1.0}, {"auxiliary": -1.0}, {"erase": 2.0}):
        with pytest.raises(ConfigError):
            cell_training.Config(**wrong)


@pytest.mark.parametrize("space", list(SPACES))
def test_the_network_found_is_trained_and_keeps_its_architecture(space):
    final = cell_training.Config(batch=16, lr=0.1, drop_path=0.2, view=1.0, flip=True)
    config = dataclasses.replace(SMALL, space=space, steps=4, search=0.5, final=final, final_cells=3, cells=3)
    with Run(quiet=True) as run:
        network = distill(DATA, config=config, run=run)
    assert network.genotype == str(network.supernet.genotype) and network.space == space
    assert [line["stage"] for line in run.history] == ["search"] * 2 + ["retrain"] * 2
    assert all("auxiliary" in line for line in run.history[2:])
    assert "supernet" not in " ".join(network.state_dict())
    assert all(getattr(layer, "drop", 0.0) == 0.0 for layer in network.body.layers)


def test_without_a_search_the_architecture_is_random():
    found = set()
    for seed in range(3):
        with Run(seed=seed, quiet=True) as run:
            found.add(distill(DATA, config=dataclasses.replace(SMALL, steps=1, search=0.0), run=run).genotype)
    assert len(found) == 3


def test_the_small_inputs_teach_and_smooth():
    given = tiny()
    with Run(quiet=True) as run:
        distill(**given, run=run)
    names = {name for line in run.history for name in line}
    assert {"kd", "validation_kd", "auxiliary"} <= names
