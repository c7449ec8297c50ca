"""Real NVP: inverses, log-determinants against autograd, known densities, dequantisation, and the trained model."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from stillhouse.data.densities import checkerboard as checkerboard_points
from stillhouse.data.densities import moons
from stillhouse.data.dequantise import from_logit, grey_levels, picture, to_logit
from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.evaluate.density import bits_per_dimension, divergence_to_truth
from stillhouse.hub.models import resolve_model
from stillhouse.models import flows
from stillhouse.models.made import MADE
from stillhouse.protocols import Density
from stillhouse.recipes.autoregressive import fit_made
from stillhouse.run import Run
from stillhouse.systems.generative import real_nvp

F64 = torch.float64
SHORT = replace(real_nvp.EMBEDDED, steps=3, batch=8)


def stirred(model, seed=0):
    """The model in eval mode with random weights and running averages: no layer is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith(("var", "mean")):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.double().eval()


def models():
    return {
        "points": (flows.point_flow(2, 6, 16), (2,)),
        "additive points": (flows.point_flow(5, 4, 8, kind="additive", scaling=True), (5,)),
        "pictures": (flows.picture_flow((1, 8, 8), 0, 2, 4, 1), (1, 8, 8)),
        "three scales": (flows.picture_flow((2, 8, 8), 0, 3, 4, 1), (2, 8, 8)),
        "nothing factored out": (flows.picture_flow((1, 4, 4), 0, 2, 4, 1, factor=False), (1, 4, 4)),
        "additive pictures": (flows.picture_flow((1, 4, 4), 0, 2, 4, 1, kind="additive", scaling=True), (1, 4, 4)),
    }


@pytest.mark.parametrize("name", list(models()))
def test_the_inverse_is_exact_and_log_determinants_cancel(name):
    torch.manual_seed(0)
    model, shape = models()[name]
    x = torch.randn(5, *shape, dtype=F64)
    with torch.no_grad():
        fresh = model.eval().flow
        assert torch.allclose(fresh.inverse(fresh(x.float())[0])[0], x.float(), atol=1e-5)
        flow = stirred(model).flow
        z, forward = flow(x)
        back, backward = flow.inverse(z)
        assert torch.allclose(back, x, atol=1e-10) and torch.allclose(forward, -backward, atol=1e-10)
        assert z.flatten(1).shape == (5, math.prod(shape)) and not torch.allclose(z.flatten(1), x.flatten(1), atol=0.1)


@pytest.mark.parametrize("name", ["points", "additive points", "pictures", "nothing factored out", "additive pictures"])
def test_the_log_determinant_is_that_of_autograds_jacobian(name):
    model, shape = models()[name]
    flow, x = stirred(model).flow, torch.randn(1, *shape, dtype=F64)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v.view(1, *shape))[0].flatten(), x.flatten())
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, flow(x)[1][0], atol=1e-9)


@pytest.mark.parametrize("name", list(models()))
def test_a_flow_that_does_nothing_is_the_standard_normal(name):
    _, shape = models()[name]
    made = {"points": flows.point_flow(2, norm=False), "additive points": flows.point_flow(5, norm=False)}
    factor = name != "nothing factored out"
    model = made.get(name) or flows.picture_flow(shape, 0, 3 if name == "three scales" else 2, 4, 1, norm=False,
                                                 factor=factor)
    for coupling in [m for m in model.modules() if isinstance(m, flows.Coupling)]:
        last = coupling.network.leave[-1] if hasattr(coupling.network, "leave") else coupling.network[-1]
        nn.init.zeros_(last.parametrizations.weight.original0)
        nn.init.zeros_(last.bias)
    x = torch.randn(4, *shape)
    z, log_det = model.eval().flow(x)
    assert torch.equal(log_det, torch.zeros(4))
    assert torch.equal(z.flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(model.log_prob(x), expected, atol=1e-4)


def test_additive_couplings_keep_volume_until_the_last_scaling():
    model = stirred(flows.point_flow(4, 4, 8, kind="additive", norm=False, scaling=True))
    log_det = model.flow(torch.randn(6, 4, dtype=F64))[1]
    assert torch.allclose(log_det, model.flow.layers[-1].log_scale.sum().expand(6))
    affine = stirred(flows.point_flow(4, 4, 8, norm=False))
    assert affine.flow(torch.randn(6, 4, dtype=F64))[1].std() > 0.01


def test_a_coupling_is_the_formula_and_leaves_the_masked_entries():
    mask = flows.checkerboard(4, 4)
    layer = stirred(flows.Coupling(mask, flows.ResidualNet(1, 2, 4, 1), 1))
    x = torch.randn(3, 1, 4, 4, dtype=F64)
    y, log_det = layer(x)
    s, t = layer.parts(mask * x)
    assert torch.allclose(y, mask * x + (1 - mask) * (x * s.exp() + t)) and torch.allclose(log_det, s.sum((1, 2, 3)))
    assert torch.equal(y * mask, x * mask) and (s * mask).abs().max() == 0 and (t * mask).abs().max() == 0
    assert s.abs().max() <= layer.scale.abs().max()
    other = x + (1 - mask) * torch.randn_like(x)
    assert torch.equal(layer.parts(mask * other)[0], s)


def test_masks_alternate_and_cover_everything():
    assert flows.checkerboard(2, 3).tolist() == [[[1, 0, 1], [0, 1, 0]]]
    assert torch.equal(flows.checkerboard(4, 4) + flows.checkerboard(4, 4, True), torch.ones(1, 4, 4))
    assert flows.half(5).tolist() == [1, 1, 0, 0, 0] and flows.half(5, True).tolist() == [0, 0, 1, 1, 1]
    flow = flows.MultiScale((1, 8, 8), 2, 4, 1)
    masks = [layer.mask for layer in flow.last.layers if isinstance(layer, flows.Coupling)]
    assert len(masks) == 4 and torch.equal(masks[0] + masks[1], torch.ones_like(masks[0]))
    assert flow.shapes == [(4, 4, 4), (2, 4, 4)]
    assert [flows.MultiScale((3, 32, 32), 4, 4, 1).shapes[-1]] == [(24, 4, 4)]
    with pytest.raises(ConfigError, match="scales"):
        flows.MultiScale((1, 6, 6), 3, 4, 1)


def test_squeeze_is_a_permutation_of_two_by_two_blocks():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    y = flows.squeeze(x)
    assert y.shape == (1, 4, 2, 2) and y[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert torch.equal(flows.unsqueeze(y), x) and torch.equal(y.flatten().sort().values, x.flatten())


@pytest.mark.parametrize("shape", [(4,), (4, 3, 3)])
def test_the_flows_batch_norm_in_both_modes(shape):
    layer = flows.FlowBatchNorm(4).double()
    x = 2 + 3 * torch.randn(64, *shape, dtype=F64)
    places = math.prod(shape[1:])
    others = [0, *range(2, x.ndim)]
    y, log_det = layer(x)
    var = x.var(others, unbiased=False)
    assert torch.allclose(y.mean(others), torch.zeros(4, dtype=F64), atol=1e-9)
    assert torch.allclose(y.var(others, unbiased=False), torch.ones(4, dtype=F64), atol=1e-4)
    assert torch.allclose(log_det, (-0.5 * places * (var + 1e-5).log().sum()).expand(64))
    assert torch.allclose(layer.mean, 0.1 * x.mean(others)) and torch.allclose(layer.var, 0.9 + 0.1 * var)
    layer.eval()
    z, before = layer(x), layer.mean.clone()
    assert torch.allclose(layer.inverse(z[0])[0], x) and torch.equal(layer.mean, before)
    assert not torch.allclose(z[0], y)


def test_the_density_integrates_to_one():
    model = stirred(flows.point_flow(2, 4, 8)).float()
    axis = torch.linspace(-30, 30, 1501)
    x = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(-1, 2)
    with torch.no_grad():
        total = model.log_prob(x).double().exp().sum() * (axis[1] - axis[0]).double() ** 2
    assert float(total) == pytest.approx(1, abs=0.01)


def test_dequantisation_has_the_known_log_determinant_and_bits():
    share = torch.tensor([[0.5, 100.25, 200.75, 255.5]], dtype=F64) / 256
    value, log_det = to_logit(share)
    assert log_det.item() == pytest.approx(8.7219572, abs=1e-6)
    log_prob = torch.distributions.Normal(0.0, 1.0).log_prob(value).sum(1) + log_det
    assert bits_per_dimension(log_prob, 4) == pytest.approx(9.4883461, abs=1e-6)
    assert torch.allclose(from_logit(value), share, atol=1e-12)
    given = share.clone().requires_grad_()
    slope = torch.autograd.grad(to_logit(given)[0].sum(), given)[0]
    assert torch.allclose(slope.log().sum(), log_det)
    printed, its_log_det = to_logit(share, symmetric=False)
    assert torch.allclose(from_logit(printed, symmetric=False), share) and its_log_det.item() != log_det.item()


def test_grey_levels_and_back():
    levels = torch.arange(17.0)[None]
    image = levels / 16 * 2 - 1
    assert torch.equal(grey_levels(image, 17), levels) and torch.allclose(picture(levels + 0.99, 17), image)
    assert picture(torch.tensor([[-3.0, 99.0]]), 17).tolist() == [[-1, 1]]
    with pytest.raises(DataError, match="scale them"):
        grey_levels(levels, 17)


def test_a_picture_model_scores_and_samples_whole_levels():
    model = stirred(flows.picture_flow((1, 4, 4), 17, 2, 4, 1)).float()
    x, u = torch.rand(3, 1, 4, 4) * 2 - 1, torch.rand(3, 1, 4, 4)
    value, log_det = to_logit((grey_levels(x, 17) + u) / 17)
    z, inner = model.flow(value)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + inner + log_det
    assert torch.allclose(model.log_prob(x, u), expected, atol=1e-4)
    whole = picture(grey_levels(x, 17), 17)
    assert torch.allclose(model.decode(model.encode(x, torch.full_like(x, 0.5))[0]), whole, atol=1e-5)
    sample = model.sample(6)
    assert sample.shape == (6, 1, 4, 4) and torch.allclose(sample, picture(grey_levels(sample, 17), 17))


def test_the_latent_surface_goes_through_its_corners():
    model = stirred(flows.point_flow(2, 4, 8))
    x = torch.randn(4, 2, dtype=F64)
    surface = model.manifold(x, 8).view(8, 8, 2)
    for place, corner in (((0, 0), x[0]), ((0, 2), x[1]), ((2, 0), x[2]), ((2, 2), x[3])):
        assert torch.allclose(surface[place], corner, atol=1e-9)


def test_points_have_their_densities():
    x = checkerboard_points(4000)
    cell = (x.x + 2).floor()
    assert bool((cell.sum(1) % 2 == 0).all()) and x.x.abs().max() <= 2 and len(x.label.unique()) == 8
    moon = moons(4000, std=0.0)
    centred = moon.x - torch.tensor([-0.5, -0.25]) - moon.label[:, None] * torch.tensor([1.0, 0.5])
    assert torch.allclose(centred.norm(dim=1), torch.ones(4000), atol=1e-5)
    with pytest.raises(DataError, match="even"):
        checkerboard_points(10, 3)
    assert divergence_to_truth(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])) == 1


def test_an_autoregressive_model_looks_back_only_and_sums_to_one():
    torch.manual_seed(0)
    model = MADE(4, 3, 32)
    x = torch.tensor([[0.0, 1.0, 2.0, 1.0]])
    logits = model(x)
    for i in range(4):
        other = x.clone()
        other[:, i] = 2 - other[:, i] + (other[:, i] == 1)
        changed = (model(other) - logits).abs().amax((0, 2)) > 0
        assert not changed[: i + 1].any()
    assert (model(2 - x + 0.5) - logits).abs().amax((0, 2))[1:].min() > 0
    everything = torch.cartesian_prod(*[torch.arange(3.0)] * 4)
    assert model.log_prob(everything).exp().sum().item() == pytest.approx(1, abs=1e-4)
    run = Run(quiet=True)
    fit_made(model, TensorSet(x=x.repeat(8, 1)), 60, 8, 1e-2, run)
    assert run.history[-1]["nll"] < 0.3 * run.history[0]["nll"] and model.sample(5).shape == (5, 4)


def test_training_lowers_the_loss_in_train_mode_and_returns_the_student_in_eval_mode():
    student = flows.picture_flow((1, 8, 8), 17, 2, 8, 1)
    run = Run(quiet=True)
    data = TensorSet(x=digits(8, "train").image)
    model = real_nvp.distill(student, data, replace(SHORT, steps=30, batch=32, l2=5e-5, flip=0.5), run)
    losses = [line["nll"] for line in run.history if "nll" in line]
    assert model is student and not any(m.training for m in model.modules()) and losses[-1] < losses[0] - 0.1
    assert all("l2" in line for line in run.history if "nll" in line)
    assert not torch.equal(model.flow.last.layers[1].var, torch.ones(2))
    again = flows.picture_flow((1, 8, 8), 17, 2, 8, 1)
    again.load_state_dict(model.state_dict())
    x, u = data.x[:4], torch.rand(4, 1, 8, 8)
    assert torch.equal(again.eval().log_prob(x, u), model.log_prob(x, u))


def test_weight_scales_are_found():
    model = flows.picture_flow((1, 4, 4), 17, 2, 4, 1)
    scales = flows.weight_scales(model)
    couplings = [m for m in model.modules() if isinstance(m, flows.Coupling)]
    assert len(couplings) == 10 and len(scales) == 10 * (1 + 1 + 2 + 2 + 1)
    assert flows.weight_scales(flows.point_flow(2, 1, 4, kind="additive", scaling=True)) != []


def test_the_papers_configuration_runs_on_pictures_of_32_pixels():
    model = flows.picture_flow(hidden=8, blocks=2)
    data = TensorSet(x=torch.rand(4, 3, 32, 32) * 2 - 1)
    real_nvp.distill(model, data, real_nvp.Config(steps=1, batch=2), Run(quiet=True))
    assert model.sample(2).shape == (2, 3, 32, 32) and model.log_prob(data.x).isfinite().all()
    deep = flows.picture_flow((3, 32, 32), scales=4, hidden=4, blocks=1)
    assert deep.flow.shapes[-1][1:] == (4, 4)


def test_a_users_own_network_for_s_and_t_is_taken():
    own = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 6))
    model = flows.FlowDensity(flows.Chain([flows.Coupling(flows.half(3), own, 3)]), (3,))
    real_nvp.distill(model, TensorSet(x=torch.randn(16, 3)), SHORT, Run(quiet=True))
    assert model.sample(4).shape == (4, 3)


def test_bad_roles_and_settings_are_named():
    data = TensorSet(x=torch.randn(16, 2))
    with pytest.raises(RoleError, match="student"):
        real_nvp.distill(nn.Linear(2, 2), data, SHORT)
    with pytest.raises(RoleError):
        real_nvp.distill(flows.point_flow(3), data, SHORT)
    with pytest.raises((RoleError, DataError), match="scale them"):
        real_nvp.distill(flows.picture_flow((1, 4, 4), 17, 2, 4, 1), TensorSet(x=10 * torch.rand(8, 1, 4, 4)), SHORT)
    with pytest.raises(ConfigError, match="flip"):
        real_nvp.Config(flip=2.0)
    with pytest.raises(RoleError, match="no density"):
        resolve_model("torch.nn:Identity", Density)
    assert isinstance(resolve_model("stillhouse.models.flows:point_flow", Density), flows.FlowDensity)
