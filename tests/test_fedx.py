import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError
from stillhouse.measures.contrastive import nt_xent
from stillhouse.measures.relations import relational_js
from stillhouse.parts.heads import Projected, predictor, projector
from stillhouse.run import Run
from stillhouse.systems.adaptation import fedx
from stillhouse.systems.adaptation.fedx import Base, Config, distill, losses
from stillhouse.testing import check_system

CONFIG = Config(rounds=2, epochs=1, batch=4, hidden=8, out=8, lr=0.1)
NAMES = {"base", "local_relation", "global_contrast", "global_relation"}


def encoder():
    return nn.Sequential(nn.Conv2d(1, 2, 3, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten())


def model(seed=0):
    torch.manual_seed(seed)
    net = Projected(encoder(), projector(18, 8, 8), predictor(8, 8))
    net.add_module("base_predictor", predictor(8, 8))
    return net.double()


def batches():
    return torch.rand(3, 5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).unbind(0)


def terms(local, downloaded, **changes):
    run, config = Run(quiet=True), dataclasses.replace(CONFIG, **changes)
    return losses(local, downloaded, Base(local, config, run), *batches(), config, run)


def test_the_four_terms_written_out_with_one_pass_over_the_three_batches():
    local, downloaded = model(0).train(), model(1).eval()
    got = terms(local, downloaded)
    z_all, g_all = model(0).train()(torch.cat(batches())), downloaded(torch.cat(batches()))
    z, z_plus, z_r = z_all.chunk(3)
    p, p_plus, _ = local.predict(z_all).chunk(3)
    _, g_plus, g_r = g_all.chunk(3)
    assert set(got) == NAMES
    expected = {"base": nt_xent(z, z_plus), "local_relation": relational_js(z, z_plus, z_r),
                "global_contrast": nt_xent(p, g_plus), "global_relation": relational_js(p, p_plus, g_r)}
    for name, value in expected.items():
        assert torch.allclose(got[name], value, atol=1e-12), name


def test_each_network_makes_one_pass_over_all_pictures():
    local, downloaded = model(0).train(), model(1).eval()
    seen = []
    for net in (local, downloaded):
        net.encoder.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    terms(local, downloaded)
    assert seen == [15, 15] and local.encoder[1].num_batches_tracked == 1


def test_the_prediction_head_speaks_to_the_global_model_alone():
    for name in NAMES:
        local, downloaded = model(0).train(), model(1).eval()
        terms(local, downloaded)[name].backward()
        has = local.predictor[0].weight.grad is not None and local.predictor[0].weight.grad.abs().max() > 0
        assert has == name.startswith("global"), name


def test_the_global_model_gets_no_gradient_and_does_not_move():
    local, downloaded = model(0).train(), model(1).eval()
    before = copy.deepcopy(downloaded.state_dict())
    sum(terms(local, downloaded).values()).backward()
    assert all(p.grad is None for p in downloaded.parameters())
    assert all(torch.equal(before[n], v) for n, v in downloaded.state_dict().items())


def test_with_the_global_model_a_copy_both_relational_terms_use_one_bank_in_eval_mode_only():
    x = torch.cat(batches())
    local, downloaded = model(0).eval(), model(0).eval()
    assert torch.equal(local(x), downloaded(x))
    local.predictor = nn.Identity()
    got = terms(local, downloaded)
    assert torch.allclose(got["local_relation"], got["global_relation"], atol=1e-14)
    local.train()
    assert not torch.allclose(local(x), downloaded(x), atol=1e-3)


def test_weights_of_zero_leave_terms_out():
    local, downloaded = model(0).train(), model(1).eval()
    off = {"global_contrast": 0.0, "local_relation": 0.0, "global_relation": 0.0}
    assert set(terms(local, downloaded, **off)) == {"base"}
    assert set(terms(local, downloaded, global_contrast=0.0, global_relation=0.0)) == {"base", "local_relation"}
    twice = terms(local, downloaded, local_relation=2.0)["local_relation"]
    assert torch.allclose(twice, 2 * terms(local, downloaded)["local_relation"])


# ---------------------------------------------------------------- base methods


def test_byol_predicts_the_target_with_its_own_head_both_ways():
    local = model(0).train()
    x, x_plus, _ = batches()
    base = Base(local, dataclasses.replace(CONFIG, base="byol"), Run(quiet=True))
    z, z_plus = local(x), local(x_plus)
    loss = base.loss(z, z_plus, x, x_plus)
    k, k_plus = copy.deepcopy(base.target)(torch.cat([x, x_plus])).chunk(2)
    expected = sum((F.normalize(local.base_predictor(a), dim=1) - F.normalize(b, dim=1)).square().sum(1).mean()
                   for a, b in ((z, k_plus), (z_plus, k)))
    assert torch.allclose(loss, expected, atol=1e-9)
    loss.backward()
    assert all(p.grad is None for p in base.target.parameters()) and local.predictor[0].weight.grad is None


def test_moco_compares_with_earlier_keys_only_and_then_adds_its_own():
    local = model(0).train()
    x, x_plus, _ = batches()
    base = Base(local, dataclasses.replace(CONFIG, base="moco", queue=8), Run(quiet=True))
    first = base.loss(local(x), local(x_plus), x, x_plus)
    assert first.abs().item() < 1e-12 and len(base.queue()) == 5
    assert base.loss(local(x), local(x_plus), x, x_plus) > 0.1 and len(base.queue()) == 8


def test_the_momentum_encoder_follows_at_its_decay():
    local = model(0)
    base = Base(local, dataclasses.replace(CONFIG, base="byol", momentum=0.75), Run(quiet=True))
    before = local.projector[0].weight.detach().clone()
    with torch.no_grad():
        local.projector[0].weight.add_(1)
    base.follow(local)
    assert torch.allclose(base.target.module.projector[0].weight, before + 0.25)


# ---------------------------------------------------------------- rounds


def clients(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [TensorSet(image=torch.rand(n, 1, 8, 8, generator=generator)) for n in sizes]


@pytest.mark.parametrize("base", ["simclr", "byol", "moco"])
def test_it_learns_with_every_base(base):
    run = Run(quiet=True)
    out = distill(encoder, clients(9, 13), clients(6)[0], dataclasses.replace(CONFIG, base=base), run)
    assert out.encode(torch.rand(3, 1, 8, 8)).shape == (3, 18)
    assert out.drift.shape == (2, 2) and (out.drift > 0).all()


def test_the_reference_is_another_batch_of_the_same_client(monkeypatch):
    pairs = []
    monkeypatch.setattr(fedx, "view", lambda images, config, run: images)
    real = fedx.losses
    monkeypatch.setattr(fedx, "losses", lambda *a: pairs.append((a[3], a[5])) or real(*a))
    first, second = (TensorSet(image=c.image + 10 * i) for i, c in enumerate(clients(12, 12)))
    distill(encoder, [first, second], config=CONFIG, run=Run(quiet=True))
    assert len(pairs) == 2 * 2 * 3
    for x, x_r in pairs:
        assert x_r.shape == x.shape and not torch.equal(x, x_r) and (x.mean() > 5) == (x_r.mean() > 5)


def test_the_global_model_is_frozen_in_a_round_and_fresh_in_the_next(monkeypatch):
    teachers = []
    real = fedx.losses

    def watched(local, downloaded, *rest):
        assert not downloaded.training and local.training and not any(p.requires_grad for p in downloaded.parameters())
        teachers.append(downloaded.projector[0].weight.detach().clone())
        return real(local, downloaded, *rest)

    monkeypatch.setattr(fedx, "losses", watched)
    distill(encoder, clients(12, 12), config=CONFIG, run=Run(quiet=True))
    assert len(teachers) == 12
    assert all(torch.equal(teachers[0], t) for t in teachers[:6]) and not torch.equal(teachers[0], teachers[6])
    assert all(torch.equal(teachers[6], t) for t in teachers[6:])


def test_drift_is_zero_without_training_and_nan_for_who_did_not_join():
    validation = clients(6)[0]
    still = distill(encoder, clients(9), validation, dataclasses.replace(CONFIG, epochs=0), Run(quiet=True))
    assert still.drift.abs().max() < 1e-6
    half = distill(encoder, clients(9, 9), validation, dataclasses.replace(CONFIG, share=0.5), Run(quiet=True))
    assert half.drift.isnan().sum(1).tolist() == [1, 1]


def test_labels_are_never_read():
    bare = clients(9, 13)
    labelled = [c.with_fields(label=torch.randperm(len(c))) for c in bare]
    a, b = (distill(encoder, part, config=CONFIG, run=Run(quiet=True)) for part in (bare, labelled))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_wrong_input_is_named():
    with pytest.raises(ConfigError, match="base"):
        Config(base="swav")
    with pytest.raises(ConfigError, match="at least one client"):
        distill(encoder, [], config=CONFIG, run=Run(quiet=True))
    with pytest.raises(DataError, match="empty"):
        distill(encoder, [clients(9)[0], clients(9)[0].select([])], config=CONFIG, run=Run(quiet=True))


def test_the_contract():
    check_system(distill, fedx.tiny)
