import copy

import pytest
import torch
from torch import nn

from stillhouse.errors import ConfigError, DataError, RoleError, StageError, UnknownNameError
from stillhouse.parts.ema import EMA
from stillhouse.parts.heads import mlp, predictor, projector
from stillhouse.parts.queues import Queue
from stillhouse.parts.taps import list_taps, taps


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


# ---------------------------------------------------------------- EMA


def test_ema_averages_what_floats_and_copies_the_rest():
    model = small()
    ema = EMA(model)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 1, 4, 4))
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    ema.update(model, decay=0.75)
    for name, value in ema.module.state_dict().items():
        now = model.state_dict()[name]
        if value.is_floating_point():
            assert torch.allclose(value, 0.75 * before[name] + 0.25 * now, atol=1e-6), name
        else:
            assert torch.equal(value, now), name
    assert ema.module[1].num_batches_tracked == 1


def test_ema_ends_and_a_constant_sequence_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model)
    nn.init.ones_(model.weight)
    ema.update(model, 1.0)
    assert ema.module.weight.item() == 0.0
    for _ in range(3):
        ema.update(model, 0.5)
    assert ema.module.weight.item() == 1 - 0.5**3
    ema.update(model, 0.0)
    assert torch.equal(ema.module.weight, model.weight)


def test_ema_averages_tied_weights_once_and_keeps_them_tied():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    nn.init.zeros_(model[0].weight)
    ema = EMA(model)
    nn.init.ones_(model[0].weight)
    ema.update(model, 0.5)
    assert ema.module[0].weight is ema.module[1].weight
    assert torch.all(ema.module[0].weight == 0.5)


def test_ema_is_frozen_calls_the_copy_and_shows_its_attributes():
    model = small()
    model.width = 7
    ema = EMA(model).eval()
    x = torch.randn(4, 1, 4, 4)
    assert not any(p.requires_grad for p in ema.parameters()) and all(p.requires_grad for p in model.parameters())
    assert torch.equal(ema(x), model.eval()(x))
    assert ema.width == 7 and copy.deepcopy(ema).width == 7
    with pytest.raises(AttributeError):
        _ = ema.nothing


def test_ema_names_what_is_wrong():
    ema = EMA(small())
    with pytest.raises(ConfigError, match="decay"):
        ema.update(small(), 1.5)
    with pytest.raises(RoleError, match="different tensors"):
        ema.update(nn.Linear(2, 2), 0.5)


# ---------------------------------------------------------------- queue


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None]


def test_queue_is_first_in_first_out_and_starts_empty():
    queue = Queue(3, 1)
    assert queue().shape == (0, 1)
    queue.push(rows(1, 2))
    assert queue().flatten().tolist() == [1, 2]
    queue.push(rows(3, 4))
    assert sorted(queue().flatten().tolist()) == [2, 3, 4]
    queue.push(rows(5, 6, 7, 8, 9))
    assert sorted(queue().flatten().tolist()) == [7, 8, 9]
    queue.push(rows(10))
    assert sorted(queue().flatten().tolist()) == [8, 9, 10]


def test_queue_keeps_no_gradient_and_continues_from_its_state():
    queue, other = Queue(3, 1), Queue(3, 1)
    queue.push(rows(1, 2, 3, 4).requires_grad_())
    assert not queue().requires_grad
    other.load_state_dict(copy.deepcopy(queue.state_dict()))
    for q in (queue, other):
        q.push(rows(5))
    assert torch.equal(queue(), other()) and sorted(other().flatten().tolist()) == [3, 4, 5]


def test_a_read_does_not_change_with_later_pushes():
    queue = Queue(2, 1)
    queue.push(rows(1, 2))
    read = queue()
    queue.push(rows(3, 4))
    assert read.flatten().tolist() == [1, 2]


def test_queue_names_a_wrong_width():
    with pytest.raises(DataError, match="1 features"):
        Queue(3, 1).push(torch.zeros(2, 2))


# ---------------------------------------------------------------- heads


def kinds(module):
    return [type(layer).__name__ for layer in module]


def test_heads_have_the_published_layers():
    assert kinds(projector(64, 32, 16)) == ["Linear", "ReLU", "Linear"]
    assert kinds(projector(64, 32, 16, layers=3, norm=True)) == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert projector(64, 32, 16, layers=3)(torch.randn(2, 64)).shape == (2, 16)
    assert predictor(16, 32)(torch.randn(2, 16)).shape == (2, 16)
    out = mlp(8, 4, 4, last_norm=True)(torch.randn(64, 8))
    assert torch.allclose(out.mean(0), torch.zeros(4), atol=1e-5)


# ---------------------------------------------------------------- taps


def test_taps_read_features_with_gradient_and_leave_no_hook():
    model = small().eval()
    x = torch.randn(4, 1, 4, 4)
    with taps(model, ["0", "3", ""]) as features:
        out = model(x)
    assert torch.equal(features["0"], model[0](x)) and features["3"].shape == (4, 8)
    assert torch.equal(features[""], out) and features["0"].requires_grad
    assert not any(m._forward_hooks for m in model.modules())


def test_taps_are_removed_on_an_exception():
    model = small()
    with pytest.raises(ZeroDivisionError), taps(model, ["0", "4"]):
        raise ZeroDivisionError
    assert not any(m._forward_hooks for m in model.modules())


def test_taps_hold_the_latest_of_several_calls_and_take_the_first_tensor_of_a_tuple():
    lstm = nn.LSTM(2, 3, batch_first=True)
    model = nn.ModuleDict({"lstm": lstm})
    with taps(model, ["lstm"]) as features:
        lstm(torch.randn(1, 4, 2))
        last = lstm(torch.randn(1, 5, 2))[0]
    assert torch.equal(features["lstm"], last)


def test_taps_name_unknown_paths_and_features_not_yet_there():
    model = nn.Sequential()
    model.add_module("layer3", nn.Linear(1, 1))
    with pytest.raises(UnknownNameError, match="'layr3'; near to it: layer3"), taps(model, ["layr3"]):
        pass
    with taps(model, ["layer3"]) as features, pytest.raises(StageError, match="nothing has been recorded at 'layer3'"):
        _ = features["layer3"]


def test_list_taps_shows_paths_and_shapes_and_leaves_the_model_alone():
    model = small()
    mean = model[1].running_mean.clone()
    assert list_taps(model, torch.randn(4, 1, 4, 4)) == {
        "0": (4, 2, 2, 2), "1": (4, 2, 2, 2), "2": (4, 2, 2, 2), "3": (4, 8), "4": (4, 3), "": (4, 3)}
    assert model.training and model[4].training and torch.equal(model[1].running_mean, mean)
