import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.modalities import Paired, SeenAs
from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError, UnknownNameError
from stillhouse.measures.crd import crd_nce, dual_contrast
from stillhouse.measures.transport import cosine_cost, sinkhorn, wasserstein
from stillhouse.parts.critics import BilinearCritic, MLPCritic, UnitProjector, critic, largest_singular_values
from stillhouse.parts.feature_taps import feature_tap, tapped_width
from stillhouse.parts.memory import ContrastMemory
from stillhouse.recipes import crd
from stillhouse.run import Run
from stillhouse.systems.compression import wcord
from stillhouse.systems.compression.wcord import Config, distill, local_term, transfer

D = torch.float64


def unit(n, d=6, seed=0):
    return F.normalize(torch.randn(n, d, dtype=D, generator=torch.Generator().manual_seed(seed)), dim=1)


def trained(**changes):
    given = wcord.tiny()
    given.update(changes)
    return distill(**given, run=Run(quiet=True))


def changed(**fields):
    return dataclasses.replace(wcord.tiny()["config"], **fields)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---------------------------------------------------------------- the transport plan


def test_the_plan_has_its_marginals():
    for eps in (0.05, 0.1):
        plan = sinkhorn(cosine_cost(unit(64, 16), unit(64, 16, 1)), eps)
        assert (plan.sum(1) - 1 / 64).abs().max() < 1e-6 and (plan.sum(0) - 1 / 64).abs().max() < 1e-12
    cost = cosine_cost(unit(5), unit(7, seed=1))
    rows, columns = (torch.rand(n, dtype=D).softmax(0) for n in (5, 7))
    plan = sinkhorn(cost, 0.1, rows, columns, tolerance=1e-10)
    assert torch.allclose(plan.sum(1), rows, atol=1e-10) and torch.allclose(plan.sum(0), columns, atol=1e-12)
    single = sinkhorn(cost.float(), 0.05)
    assert single.dtype == torch.float32 and (single.sum(1) - 1 / 5).abs().max() < 1e-6


def test_twenty_rounds_do_not_suffice():
    cost = cosine_cost(unit(64, 4), unit(64, 4, 1))
    assert (sinkhorn(cost, 0.05, iterations=20).sum(1) - 1 / 64).abs().max() > 1e-6
    assert (sinkhorn(cost, 0.05).sum(1) - 1 / 64).abs().max() < 1e-6


def test_the_cost_of_two_points():
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=D)
    for eps in (0.3, 1.0):
        assert wasserstein(cost, eps).item() == pytest.approx(math.exp(-1 / eps) / (1 + math.exp(-1 / eps)), abs=1e-12)
    assert wasserstein(cost, 0.3).item() == pytest.approx(0.0344452, abs=1e-7)


def test_small_eps_finds_the_permutation_and_large_eps_mixes_everything():
    u, turn = unit(8), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    cost = cosine_cost(u[turn], u)
    plan = sinkhorn(cost, 2e-3)
    assert torch.allclose(8 * plan, torch.eye(8, dtype=D)[turn], atol=1e-6)
    assert wasserstein(cost, 2e-3).item() < 1e-8
    assert torch.allclose(sinkhorn(cost, 1e9), torch.full((8, 8), 1 / 64, dtype=D), atol=1e-9)


def test_batches_of_problems_and_rows_without_mass():
    cost = torch.stack([cosine_cost(unit(5, seed=i), unit(6, seed=i + 9)) for i in range(3)])
    rows = torch.tensor([0.5, 0.0, 0.25, 0.25, 0.0], dtype=D).expand(3, 5)
    plan = sinkhorn(cost, 0.1, rows=rows, tolerance=1e-9)
    assert torch.allclose(plan[1], sinkhorn(cost[1], 0.1, rows[1], tolerance=1e-9), atol=1e-8)
    assert plan[:, [1, 4]].abs().max() == 0 and torch.isfinite(plan).all()
    assert wasserstein(cost, 0.1, rows).shape == (3,)


def test_it_approaches_the_exact_assignment():
    from stillhouse.evaluate.transport import assignment_cost

    x, y = unit(20), unit(20, seed=1)
    found = wasserstein(cosine_cost(x, y), 1e-3, iterations=20_000).item()
    assert found == pytest.approx(assignment_cost(x, y), abs=1e-3)
    assert assignment_cost(x, x[torch.randperm(20)]) == pytest.approx(0, abs=1e-12)


def test_the_gradient_treats_the_plan_as_a_constant():
    u, v = unit(6), unit(6, seed=1).requires_grad_()
    plan = sinkhorn(cosine_cost(v.detach(), u), 0.1)
    (expected,) = torch.autograd.grad((plan * cosine_cost(v, u)).sum(), v)
    (found,) = torch.autograd.grad(local_term(v, u, 0.1), v)
    assert torch.allclose(found, expected, atol=1e-14)
    log_b = torch.zeros(6, dtype=D)
    scaled = -cosine_cost(v, u) / 0.1
    for _ in range(300):
        log_a = -math.log(6) - torch.logsumexp(scaled + log_b, 1)
        log_b = -math.log(6) - torch.logsumexp(scaled + log_a[:, None], 0)
    through = (scaled + log_a[:, None] + log_b).exp()
    (other,) = torch.autograd.grad((through * cosine_cost(v, u)).sum(), v)
    assert (other - expected).abs().max() > 1e-3


def test_autocast_does_not_reach_the_plan():
    cost = cosine_cost(unit(16).float(), unit(16, seed=1).float())
    with torch.autocast("cpu", torch.bfloat16):
        plan = sinkhorn(cost, 0.05)
    assert torch.equal(plan, sinkhorn(cost, 0.05)) and sinkhorn(cost.bfloat16(), 0.1).dtype == torch.float32


def test_the_local_term_is_blind_to_the_order_of_the_student_and_the_global_one_is_not():
    u, v, turn = unit(8), unit(8, seed=1), torch.tensor([1, 2, 3, 4, 5, 6, 7, 0])
    assert local_term(v[turn], u, 0.1).item() == pytest.approx(local_term(v, u, 0.1).item(), abs=1e-6)
    c, bank = critic("dot", 6), unit(20, seed=2)
    far = torch.arange(20).repeat(8, 1)
    one, two = (dual_contrast(c(x, u), c(x[:, None], bank[far])) for x in (v, v[turn]))
    assert (one - two).abs() > 1e-2


# ---------------------------------------------------------------- the contrastive losses


def test_nce_written_out():
    positive, negatives, size, z, tau = torch.tensor([0.9, -0.2], dtype=D), unit(2, 3), 50, 7.0, 0.5
    total = 0.0
    for i in range(2):
        e = math.exp(positive[i] / tau) / z
        total -= math.log(e / (e + 3 / size))
        for s in negatives[i].tolist():
            e = math.exp(s / tau) / z
            total -= math.log(1 - e / (e + 3 / size))
    found = crd_nce(positive, negatives, size, math.log(z), tau)
    assert found.item() == pytest.approx(total / 2, abs=1e-12)


def test_the_dual_loss_is_a_difference_of_means_bounded_by_2():
    v, u, bank = unit(5), unit(5, seed=1), unit(9, seed=2)
    c = critic("dot", 6)
    loss = dual_contrast(c(v, u), c(v[:, None], bank.expand(5, 9, 6)))
    assert loss.item() == pytest.approx(((v @ bank.T).mean() - (v * u).sum(1).mean()).item(), abs=1e-12)
    worst = dual_contrast(c(v, -v), c(v[:, None], v[:, None].expand(5, 3, 6)))
    assert worst.item() == pytest.approx(2, abs=1e-12) and abs(loss) <= 2


def test_the_memory_moves_by_momentum_and_stays_on_the_sphere():
    memory = ContrastMemory(6, 4, momentum=0.5)
    before = copy.deepcopy(memory.u), copy.deepcopy(memory.v)
    index, u, v = torch.tensor([4, 1]), unit(2, 4).float(), unit(2, 4, 1).float()
    memory.update(index, u, v)
    for old, bank, new in zip(before, (memory.u, memory.v), (u, v), strict=True):
        assert torch.allclose(bank[index], F.normalize(old[index] + new, dim=1), atol=1e-6)
        assert torch.equal(bank[[0, 2, 3, 5]], old[[0, 2, 3, 5]])
        assert torch.allclose(bank.norm(dim=1), torch.ones(6), atol=1e-6)
    with pytest.raises(DataError, match="indices from 0 to 6"):
        memory.update(torch.tensor([0, 6]), u, v)


def test_negatives_are_the_others_all_equally_likely_and_z_is_set_once():
    memory = ContrastMemory(4, 3)
    index = torch.tensor([0, 2, 3])
    others = memory.others(index, torch.arange(3).repeat(3, 1))
    assert others.tolist() == [[1, 2, 3], [0, 1, 3], [0, 1, 2]]
    run = Run(quiet=True)
    for k in run.loop("x", steps=2, memory=memory):
        scores = tuple(unit(3, d, seed=k).squeeze(1) for d in (1, 5, 5))
        crd.nce(scores, memory, 0.5, run)
        if k == 0:
            first = memory.log_z.clone()
            exp = torch.cat([scores[0][:, None], scores[1]], 1).div(0.5).exp()
            assert first[0].item() == pytest.approx(math.log(4 * exp.mean()), abs=1e-6)
    assert torch.equal(memory.log_z, first)


# ---------------------------------------------------------------- the critic


def test_critics_are_1_lipschitz_after_training():
    torch.manual_seed(0)
    for net in (BilinearCritic(8), MLPCritic(8, 16, 3)):
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        u, v = unit(32, 8).float(), unit(32, 8, 1).float()
        for _ in range(30):
            optimizer.zero_grad()
            (-net(v, u).mean() + net(v, u.roll(1, 0)).mean()).backward()
            optimizer.step()
        with torch.no_grad():
            for _ in range(200):
                net(v, u)
        assert max(largest_singular_values(net)) <= 1 + 1e-3
        net.eval()
        other = unit(32, 8, 5).float()
        assert ((net(v, u) - net(other, u)).abs() <= (v - other).norm(dim=1) * (1 + 1e-3)).all()
        assert ((net(v, u) - net(v, other)).abs() <= (u - other).norm(dim=1) * (1 + 1e-3)).all()
        near = F.normalize(v + 0.01 * other, dim=1)
        assert ((net(v, u) - net(near, u)).abs() <= (v - near).norm(dim=1) * (1 + 1e-3) + 1e-7).all()


def test_without_spectral_norm_the_critic_grows():
    torch.manual_seed(0)
    config = changed(objective="dual", spectral=False, steps=60, lr=0.5, ce=0.0, kd=0.0, lckt=0.0, gckt=1.0)
    given = wcord.tiny()
    _, free = transfer(given["teacher"], given["student"], given["data"], config, Run(quiet=True))
    given = wcord.tiny()
    _, bound = transfer(given["teacher"], given["student"], given["data"],
                        dataclasses.replace(config, spectral=True), Run(quiet=True))
    with torch.no_grad():
        for _ in range(200):
            bound.critic(torch.ones(1, 6), torch.ones(1, 6))
    assert max(largest_singular_values(bound.critic)) <= 1 + 1e-3 < 1.5 < max(largest_singular_values(free.critic))


def test_the_bilinear_critic_is_v_w_u_whichever_side_has_more_rows():
    c = BilinearCritic(6, spectral=False).double()
    nn.init.normal_(c.linear.weight)
    v, u = unit(4), unit(4, seed=1)
    W = c.linear.weight
    assert torch.allclose(c(v, u), torch.stack([a @ W @ b for a, b in zip(v, u, strict=True)]))
    assert torch.allclose(c(v[:, None], u[None].expand(4, 4, 6)), v @ W @ u.T)
    assert torch.allclose(c(v[None].expand(4, 4, 6), u[:, None]), (v @ W @ u.T).T)


def test_embeddings_have_length_1():
    torch.manual_seed(0)
    assert torch.allclose(UnitProjector(5, 7, True)(torch.randn(3, 5)).norm(dim=1), torch.ones(3), atol=1e-6)


# ---------------------------------------------------------------- features


def test_a_feature_tap_reads_what_goes_into_the_last_layer_and_leaves_nothing_behind():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))
    x = torch.randn(2, 1, 8, 8)
    with feature_tap(net) as h:
        out = net(x)
        assert torch.equal(h(), net[:3](x)) and torch.equal(net[3](h()), out)
    with feature_tap(net, "0") as h:
        net(x)
        assert torch.allclose(h(), net[0](x).mean((2, 3)))
    with feature_tap(net, "output") as h:
        assert torch.equal(net(x), h())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert (tapped_width(net, x), tapped_width(net, x, "0"), tapped_width(net, x, "output")) == (108, 3, 4)
    with pytest.raises(RoleError, match="no linear layer"):
        tapped_width(net[:2], x)
    with pytest.raises(UnknownNameError, match="no module"):
        tapped_width(net, x, "body")


# ---------------------------------------------------------------- the system


def test_with_a_dot_critic_without_lipschitz_and_local_term_it_is_crd():
    given = wcord.tiny()
    fields = {f.name for f in dataclasses.fields(crd.Config)}
    config = changed(critic="dot", spectral=False, lckt=0.0, view=0.0)
    plain = crd.Config(**{n: v for n, v in dataclasses.asdict(config).items() if n in fields}, crd=config.gckt)

    class Named(Run):
        """Both loops under one name, so that they draw the same."""

        def loop(self, name, *args, **kwargs):
            return super().loop("x", *args, **kwargs)

    out = distill(**{**given, "config": config}, run=Named(quiet=True))
    given = wcord.tiny()
    other = crd.distill(given["teacher"], given["student"], given["data"], plain, Named(quiet=True))
    assert same(out, other)


@pytest.mark.parametrize("critic", ["bilinear", "dot", "mlp"])
@pytest.mark.parametrize("objective", ["dual", "nce"])
def test_every_objective_and_critic_trains_the_student(objective, critic):
    start = wcord.tiny()["student"]
    assert not same(trained(config=changed(objective=objective, critic=critic, ce=0.0, kd=0.0)), start)


def test_a_term_of_weight_0_is_not_computed():
    run = Run(quiet=True)
    given = wcord.tiny()
    distill(**{**given, "config": changed(kd=0.0, gckt=0.0)}, run=run)
    assert all({"ce", "lckt"} == set(line) - {"k", "stage", "step"} for line in run.history)


def test_labels_are_not_read_without_ce_and_classes_need_not_agree_without_kd():
    given = wcord.tiny()
    torch.manual_seed(1)
    unlike = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 7))
    config = changed(ce=0.0, kd=0.0)
    one = trained(student=copy.deepcopy(unlike), data=given["data"].without("label"), config=config)
    two = trained(student=copy.deepcopy(unlike), config=config)
    assert same(one, two) and not same(one, unlike)
    with pytest.raises(RoleError, match="same number of classes"):
        trained(student=unlike)


def test_the_teacher_sees_the_other_modality_and_both_the_same_view():
    seen = {}

    def recorder(name):
        def hook(module, inputs):
            seen.setdefault(name, []).append(inputs[0].clone())
        return hook

    given = wcord.tiny()
    image = given["data"].image
    data = given["data"].with_fields(other=-2 * image)
    for name in ("teacher", "student"):
        given[name].register_forward_pre_hook(recorder(name))
    distill(**{**given, "data": data, "config": changed(teacher_sees="other", view=0.0)}, run=Run(quiet=True))
    assert all(torch.equal(t, -2 * s) for t, s in zip(seen["teacher"][-5:], seen["student"][-5:], strict=True))
    given, big = wcord.tiny(), F.interpolate(image, 16)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4))
    config = changed(teacher_sees="other", view=0.0, kd=0.0)
    privileged = given["data"].with_fields(other=big)
    assert distill(**{**given, "teacher": teacher, "data": privileged, "config": config}, run=Run(quiet=True))
    with pytest.raises(DataError, match="one size"):
        trained(teacher=teacher, data=privileged, config=dataclasses.replace(config, view=1.0))


def test_pairs_of_two_sets():
    one, two = TensorSet(image=torch.zeros(3, 1, 2, 2), label=torch.arange(3)), TensorSet(image=torch.ones(3, 3, 4, 4))
    pairs = Paired(one, two)
    assert pairs.fields == ("image", "label", "other") and pairs[1]["other"].shape == (3, 4, 4)
    assert pairs[1]["label"] == 1 and len(pairs) == 3
    assert SeenAs(pairs).batch([0, 2])["image"].shape == (2, 3, 4, 4) and SeenAs(pairs)[1]["image"].mean() == 1
    with pytest.raises(DataError, match="3 and 2"):
        Paired(one, two.select([0, 1]))
    with pytest.raises(DataError, match="no field 'other'"):
        SeenAs(one)
    given = wcord.tiny()
    paired = Paired(given["data"], TensorSet(image=given["data"].image))
    assert distill(**{**given, "data": paired, "config": changed(teacher_sees="other")}, run=Run(quiet=True))


def test_a_file_with_the_other_modality_is_read(tmp_path):
    import numpy as np

    from stillhouse.data.readers import read_data
    from stillhouse.protocols import Images

    np.savez(tmp_path / "pairs.npz", image=np.zeros((4, 8, 8), np.uint8), other=np.full((4, 3, 8, 8), 255, np.uint8))
    data = read_data(tmp_path / "pairs.npz", Images)
    assert data.image.shape == (4, 1, 8, 8) and data.other.shape == (4, 3, 8, 8) and data.other.mean() == 1


def test_the_transport_cost_to_held_out_pictures_falls():
    given = wcord.tiny()
    torch.manual_seed(5)
    held_out = TensorSet(image=torch.rand(30, 1, 8, 8))
    config = changed(steps=150, lr=0.02, ce=0.0, kd=0.0, gckt=0.0, lckt=1.0, optimizer="adamw", view=0.0, eps=0.05)
    costs = []
    for steps in (0, 150):
        run, given = Run(quiet=True), wcord.tiny()
        student, contrast = transfer(given["teacher"], given["student"], given["data"],
                                     dataclasses.replace(config, steps=steps), run)
        v, u = wcord.embeddings(given["teacher"], student, contrast, held_out, config, run)
        costs.append(wasserstein(cosine_cost(v, u), 0.05).item())
    assert costs[1] < 0.3 * costs[0]


def test_wrong_input_is_named_before_any_step():
    for fields, match in (({"objective": "kl"}, "objective"), ({"critic": "cosine"}, "critic"), ({"eps": 0.0}, "eps"),
                          ({"gckt": -1.0}, "gckt"), ({"teacher_sees": "depth"}, "teacher_sees"),
                          ({"momentum": 1.0}, "momentum"), ({"ce": 0.0, "gckt": 0.0, "lckt": 0.0}, "one of ce")):
        with pytest.raises(ConfigError, match=match):
            Config(**fields)
    given = wcord.tiny()
    with pytest.raises(DataError, match="label"):
        trained(data=given["data"].without("label"))
    with pytest.raises(DataError, match="other"):
        trained(config=changed(teacher_sees="other"))
    with pytest.raises(RoleError, match="between 9 and 9, but student has 4"):
        trained(data=given["data"].with_fields(label=torch.full((12,), 9)))
    with pytest.raises(UnknownNameError, match="no module 'neck'"):
        trained(config=changed(student_feature="neck"))


@pytest.mark.unchecked
def test_the_plan_names_bad_input():
    with pytest.raises(ConfigError, match="eps"):
        sinkhorn(torch.rand(3, 3), 0.0)
    with pytest.raises(DataError, match=r"shape \(4,\), expected \(3,\)"):
        sinkhorn(torch.rand(3, 3), rows=torch.full((4,), 0.25))
    with pytest.raises(DataError, match="negative"):
        sinkhorn(torch.rand(2, 2), rows=torch.tensor([1.5, -0.5]))
    with pytest.raises(DataError, match="equal sums"):
        sinkhorn(torch.rand(2, 2), rows=torch.ones(2))
    with pytest.raises(DataError, match="one row of negatives per sample"):
        dual_contrast(torch.rand(5), torch.rand(4, 3))


# ---------------------------------------------------------------- real models


def test_it_runs_on_saved_classifiers_of_transformers_and_on_features(tmp_path):
    transformers = pytest.importorskip("transformers")
    from stillhouse.hub.models import resolve_model
    from stillhouse.protocols import Classifier, Encoder

    torch.manual_seed(0)
    transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1, num_labels=4)).save_pretrained(tmp_path / "vit")
    for name, depth in (("resnet34", 2), ("resnet18", 1)):
        transformers.ResNetForImageClassification(transformers.ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[depth, depth], layer_type="basic",
            num_labels=4)).save_pretrained(tmp_path / name)
    transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(
        num_channels=1, image_size=32, depth_multiplier=0.1, num_labels=4)).save_pretrained(tmp_path / "mobile")
    for teacher_name, student_name, kind in (("resnet34", "resnet18", Classifier), ("resnet34", "mobile", Classifier),
                                             ("vit", "resnet18", Encoder)):
        teacher, student = (resolve_model(f"hf:{tmp_path / n}", kind) for n in (teacher_name, student_name))
        where = "penultimate" if kind is Classifier else "output"
        config = changed(steps=2, teacher_feature=where, student_feature=where, ce=float(kind is Classifier), kd=0.0)
        before, start = copy.deepcopy(teacher), copy.deepcopy(student)
        out = trained(teacher=teacher, student=student, config=config)
        assert out is student and same(teacher, before) and not same(student, start)


def test_the_penultimate_features_of_a_transformer_are_its_class_token():
    transformers = pytest.importorskip("transformers")
    from stillhouse.hub.models import fit_role
    from stillhouse.protocols import Classifier

    torch.manual_seed(0)
    vit = fit_role(transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1, num_labels=4)), Classifier, "teacher").eval()
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad(), feature_tap(vit) as h:
        vit(x)
        assert torch.allclose(h(), vit.encode(x), atol=1e-6)
