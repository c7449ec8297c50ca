import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse.errors import ConfigError, DamagedFileError, DataError, RoleError, StoreError
from stillhouse.evaluate.size import compression, full_bits, huffman_lengths, huffman_mean, model_size, tensor_bits
from stillhouse.parts.packed import QuantizedModel, pack_bits, unpack_bits
from stillhouse.parts.quantizers import (
    Code,
    Codebook,
    allocate_points,
    encode,
    even_index,
    even_points,
    from_buckets,
    nearest_index,
    percentile_points,
    quantizable,
    quantize,
    scaled,
    straight_through,
    to_buckets,
)


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


CASES = [(4, 16), (2, 5), (3, None), (16, 1000), (256, 7)]


# ---------------------------------------------------------------- buckets and the uniform quantiser


def test_buckets_are_filled_up_with_the_last_value_and_short_tensors_are_one_bucket():
    v = torch.arange(10.0).view(2, 5)
    assert to_buckets(v, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert to_buckets(v, 5).shape == (2, 5) and to_buckets(v, 11).shape == (1, 10) == to_buckets(v, None).shape
    assert torch.equal(from_buckets(to_buckets(v, 4), v.shape), v)
    one = torch.tensor(0.3)
    assert torch.equal(quantize(one, 4), one) and torch.equal(encode(one, 4).decode(), one)


def test_the_example_of_four_numbers():
    v = torch.tensor([0, 0.2, 0.6, 1], dtype=torch.float64)
    assert quantize(v, 3).tolist() == [0, 0, 0.5, 1]


def test_a_constant_bucket_is_unchanged():
    v = torch.cat([torch.full((4,), 0.3), torch.tensor([1.0, 2, 3, 5])])
    assert torch.equal(quantize(v, 4, 4)[:4], v[:4])
    assert torch.equal(encode(v, 4, 4).decode()[:4], v[:4])


@pytest.mark.parametrize(("levels", "bucket"), CASES)
def test_every_bucket_has_at_most_s_values_and_keeps_its_ends(levels, bucket):
    v = draws(7, 11)
    q = quantize(v, levels, bucket)
    for before, after in zip(to_buckets(v, bucket), to_buckets(q, bucket), strict=True):
        assert len(after.unique()) <= levels
        if levels > 1:
            assert after.min() == before.min() and after.max() == before.max()


@pytest.mark.parametrize(("levels", "bucket"), CASES)
def test_quantising_twice_changes_nothing_and_the_error_is_bounded(levels, bucket):
    v = draws(7, 11, seed=1)
    q = quantize(v, levels, bucket)
    assert torch.allclose(quantize(q, levels, bucket), q, atol=1e-14)
    s = scaled(v, bucket)
    half = from_buckets(((s.high - s.low) / (2 * (levels - 1))).expand_as(s.values), v.shape)
    assert ((q - v).abs() <= half + 1e-14).all()


def test_halves_go_to_the_even_level():
    assert even_index(torch.tensor([0.5, 1.5, 2.5]) / 4, 5).tolist() == [0, 2, 2]


def test_stochastic_rounding_is_unbiased():
    v = draws(40, seed=2)
    g = torch.Generator().manual_seed(3)
    n = 4000
    mean = torch.stack([quantize(v, 4, 16, u=torch.rand(40, generator=g, dtype=v.dtype)) for _ in range(n)]).mean(0)
    s = scaled(v, 16)
    step = from_buckets(((s.high - s.low) / 3).expand_as(s.values), v.shape)
    assert ((mean - v).abs() < 5 * 0.5 * step / math.sqrt(n) + 1e-12).all()
    assert (quantize(v, 4, 16) - v).abs().max() > 10 * (mean - v).abs().max()


def test_half_precision_is_computed_in_float32():
    v = draws(64, dtype=torch.float32).bfloat16()
    assert torch.equal(quantize(v, 16, 16), quantize(v.float(), 16, 16).bfloat16())


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="bucket"):
        to_buckets(torch.zeros(3), 0)
    with pytest.raises(DataError, match="without values"):
        quantize(torch.zeros(0), 4)
    with pytest.raises(ConfigError, match="gradient"):
        straight_through(torch.zeros(3), 4, gradient="clipped")
    with pytest.raises(ConfigError, match="levels"):
        even_points(0)


# ---------------------------------------------------------------- gradients


def autograd_reference(w, levels, bucket):
    """Through minimum and maximum, and straight through the rounding."""
    buckets = to_buckets(w, bucket)
    low, high = buckets.min(1, keepdim=True).values, buckets.max(1, keepdim=True).values
    x = (buckets - low) / (high - low)
    q = x + ((x * (levels - 1)).round() / (levels - 1) - x).detach()
    return from_buckets(q * (high - low) + low, w.shape)


@pytest.mark.parametrize("bucket", [8, 5, 100, None])
def test_the_complicated_gradient_is_autograd_through_the_ends(bucket):
    w = draws(6, 7, seed=4).requires_grad_()
    g = draws(6, 7, seed=5)
    (expected,) = torch.autograd.grad(autograd_reference(w, 4, bucket), w, g)
    out = straight_through(w, 4, bucket, "complicated")
    (given,) = torch.autograd.grad(out, w, g)
    assert torch.allclose(given, expected, rtol=0, atol=1e-12) and not torch.allclose(given, g)
    assert torch.equal(out.detach(), quantize(w, 4, bucket))


def test_with_the_largest_value_last_the_filled_up_bucket_still_adds_up():
    w = torch.tensor([0.3, 0.1, 0.0, 0.6, 0.2, 0.9], dtype=torch.float64, requires_grad=True)
    g = draws(6, seed=6)
    (given,) = torch.autograd.grad(straight_through(w, 3, 4, "complicated"), w, g)
    (expected,) = torch.autograd.grad(autograd_reference(w, 3, 4), w, g)
    assert torch.allclose(given, expected, atol=1e-12)
    assert given.sum().item() == pytest.approx(g.sum().item(), abs=1e-12)


def test_plain_and_truncated_gradients():
    w = torch.tensor([-1.5, -0.4, 0.1, 0.7, 3.0], requires_grad=True)
    g = torch.arange(1.0, 6)
    (plain,) = torch.autograd.grad(straight_through(w, 4), w, g)
    out = straight_through(w, 4, gradient="truncated")
    (truncated,) = torch.autograd.grad(out, w, g)
    assert torch.equal(plain, g) and truncated.tolist() == [0, 2, 3, 4, 0]
    assert torch.equal(out.detach(), quantize(w.clamp(-1, 1), 4)) and out.min() == -1 and out.max() == 1


# ---------------------------------------------------------------- learned points


def test_points_begin_at_the_percentiles():
    x = draws(101, seed=7)
    for levels in (2, 3, 4, 16, 200):
        expected = np.percentile(x.numpy(), np.linspace(0, 100, levels))
        assert np.allclose(percentile_points(x, levels).numpy(), expected, atol=1e-12)


def test_the_nearest_point_is_taken():
    x, points = torch.rand(200, dtype=torch.float64), torch.rand(7, dtype=torch.float64).sort().values
    assert torch.equal(nearest_index(x, points).long(), (x[:, None] - points).abs().argmin(1))
    assert nearest_index(torch.tensor([0.5]), torch.tensor([0.0, 1.0])).item() == 0


def test_evenly_spaced_points_give_the_uniform_quantiser():
    v = draws(9, 13, seed=8)
    for levels in (2, 4, 16):
        for bucket in (10, None):
            assert torch.allclose(quantize(v, levels, bucket, points=even_points(levels, v)),
                                  quantize(v, levels, bucket), atol=1e-14)
            assert torch.allclose(Codebook(v, levels, bucket, "even")(), quantize(v, levels, bucket), atol=1e-14)


def test_the_gradient_of_a_point_is_the_sum_over_its_values():
    v, g = draws(5, 9, seed=9), draws(5, 9, seed=10)
    book = Codebook(v, 4, 16)
    book().backward(g)
    s = scaled(v, 16)
    alpha = from_buckets((s.high - s.low).expand_as(s.values), v.shape)
    index = from_buckets(nearest_index(s.values, book.points.detach()), v.shape)
    expected = torch.stack([(alpha * g)[index == j].sum() for j in range(4)])
    assert torch.allclose(book.points.grad, expected, atol=1e-12)
    assert book.points.grad.sum().item() == pytest.approx((alpha * g).sum().item(), abs=1e-12)


def test_the_gradient_of_a_point_is_the_slope_of_the_loss():
    v = draws(6, 8, seed=11)
    book = Codebook(v, 4, 16)

    def loss():
        return book().sin().square().sum()

    loss().backward()
    h = 1e-7
    for j in range(4):
        with torch.no_grad():
            book.points[j] += h
            above = loss()
            book.points[j] -= 2 * h
            below = loss()
            book.points[j] += h
        assert ((above - below) / (2 * h)).item() == pytest.approx(book.points.grad[j].item(), rel=1e-6)


def test_points_are_sorted():
    book = Codebook(draws(20, dtype=torch.float64), 4)
    with torch.no_grad():
        book.points.copy_(torch.tensor([0.9, 0.1, 0.5, 0.2], dtype=torch.float64))
    wrong = book()
    book.sort_()
    assert book.points.tolist() == [0.1, 0.2, 0.5, 0.9]
    assert (book().detach() - draws(20)).abs().max() < (wrong - draws(20)).abs().max()


# ---------------------------------------------------------------- allocation, names


def test_points_are_shared_out_by_importance_and_their_number_is_kept():
    assert allocate_points([1, 1, 1], 4) == [4, 4, 4]
    assert allocate_points([3, 1, 0], 16) == [8 + 18, 8 + 6, 8]
    assert allocate_points([1, 1, 1], 2) == [2, 2, 2]
    assert allocate_points([0, 0], 8) == [8, 8]
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        norms = torch.rand(17, generator=g).tolist()
        points = allocate_points(norms, 4)
        assert sum(points) == 17 * 4 and min(points) >= 2
        order = sorted(range(17), key=lambda i: norms[i])
        assert all(points[a] <= points[b] + 1 for a, b in itertools.pairwise(order))
    with pytest.raises(DataError, match="finite"):
        allocate_points([1, float("nan")], 4)


def test_which_parameters_are_quantised():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    assert quantizable(net) == [n for n, _ in net.named_parameters()]
    assert quantizable(net, "weights") == ["0.weight", "2.weight", "4.weight"]
    assert quantizable(net, "all", spare_ends=True) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    assert quantizable(net, "weights", keep=("2.*",)) == ["0.weight", "4.weight"]
    assert quantizable(net, "none") == []
    with pytest.raises(RoleError, match="no parameter is named 'norm"):
        quantizable(net, keep=("norm*",))
    with pytest.raises(RoleError, match="nothing"):
        quantizable(net, keep=("*",))
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert quantizable(tied, "weights") == ["0.weight"]


# ---------------------------------------------------------------- size


def test_the_size_formula_gives_the_papers_rates():
    assert compression(4, 256) == pytest.approx(7.529, abs=1e-3)
    assert compression(2, 256) == pytest.approx(14.22, abs=1e-2)
    assert tensor_bits(1000, 4, 256) == 4 * 1000 + 64 * 4 and tensor_bits(10, 2, 256) == 20 + 64
    assert tensor_bits(256 * 50, 4, 256) * compression(4, 256) == pytest.approx(32 * 256 * 50)
    assert tensor_bits(100, 2, None) == 264


def test_huffman_codes_are_optimal():
    assert huffman_lengths([8, 4, 2, 1, 1]) == [1, 2, 3, 4, 4]
    assert huffman_lengths([0, 5, 0]) == [0, 0, 0] and huffman_lengths([1, 1, 1, 1]) == [2, 2, 2, 2]
    index = (draws(5000, seed=12).abs() * 3).long().clamp(max=15)
    p = torch.bincount(index).double() / 5000
    entropy = -(p[p > 0] * p[p > 0].log2()).sum().item()
    lengths = torch.tensor(huffman_lengths(torch.bincount(index).tolist()))
    assert entropy <= huffman_mean(index) < entropy + 1 and huffman_mean(index) < 4
    assert (0.5 ** lengths[p > 0].double()).sum().item() == 1


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8, 11, 16])
def test_indices_are_packed_without_loss_or_waste(bits):
    index = torch.randint(0, 2**bits, (77,), dtype=torch.int32)
    packed = pack_bits(index, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-77 * bits // 8)
    assert torch.equal(unpack_bits(packed, 77, bits), index)


def net():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 30))
    made(torch.randn(5, 1, 8, 8))
    return made


def quantised(levels=(4, 16, 5)):
    model = net()
    w = dict(model.named_parameters())
    book = Codebook(w["1.weight"], levels[2], 3)
    return QuantizedModel(model, {"0.weight": encode(w["0.weight"], levels[0], 16),
                                  "4.weight": encode(w["4.weight"], levels[1], 64), "1.weight": book.code()})


def test_a_code_decodes_to_the_quantised_tensor():
    v = draws(9, 31, dtype=torch.float32)
    for levels, bucket in CASES:
        assert torch.equal(encode(v, levels, bucket).decode(), quantize(v, levels, bucket))
    book = Codebook(v, 7, 64)
    assert torch.equal(book.code().decode(), book().detach())
    assert [Code(None, None, None, None, s, None, ()).bits for s in (1, 2, 3, 4, 5, 16, 17)] == [1, 1, 2, 2, 3, 4, 5]


def test_loading_gives_the_same_model_bit_for_bit(tmp_path):
    target = quantised()
    target.save(tmp_path)
    torch.manual_seed(9)
    fresh = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 30))
    loaded = QuantizedModel.load(tmp_path, fresh)
    assert loaded.model is fresh
    for a, b in zip(target.model.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(loaded.codes[n].index, c.index) for n, c in target.codes.items())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(target.model.eval()(x), fresh.eval()(x))


def test_the_file_is_as_large_as_the_formula_says(tmp_path):
    """Beside the numbers there are a header of names and offsets and a list of the shapes, which do not grow with the
    tensors; each tensor's indices end on a whole byte."""
    target = quantised()
    size = model_size(target)
    n = {"0.weight": (72, 2, 5), "4.weight": (8640, 4, 135), "1.weight": (8, 3, 3)}
    assert size.quantized == sum(count * bits + 64 * buckets for count, bits, buckets in n.values()) + 32 * 5
    target.save(tmp_path)
    file = (tmp_path / "weights.safetensors").read_bytes()
    payload = len(file) - 8 - int.from_bytes(file[:8], "little")
    assert 0 <= payload - (size.quantized + size.rest) / 8 < 3
    assert len(file) - payload < 1500 and (tmp_path / "quantized.json").stat().st_size < 1000
    assert size.full == 32 * (72 + 8640 + 8) and size.full + size.rest == full_bits(net())
    assert size.megabytes == pytest.approx(payload / 1e6, abs=1e-5) and size.huffman_megabytes < size.megabytes


def test_tied_weights_are_stored_once(tmp_path):
    def tied():
        made = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))
        made[1].weight = made[0].weight
        return made

    model = tied()
    target = QuantizedModel(model, {"0.weight": encode(model[0].weight, 4, 16)})
    assert list(target.rest()) == ["1.bias"]
    target.save(tmp_path)
    loaded = QuantizedModel.load(tmp_path, tied()).model
    assert loaded[1].weight is loaded[0].weight and torch.equal(loaded[0].weight, model[0].weight)


def test_broken_files_and_other_networks_are_refused(tmp_path):
    quantised().save(tmp_path)
    with pytest.raises(StoreError, match="4.weight"):
        QuantizedModel.load(tmp_path, nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                                                    nn.Linear(8 * 36, 31)))
    with pytest.raises(StoreError, match="differ in"):
        QuantizedModel.load(tmp_path, nn.Sequential(*net(), nn.Linear(30, 2)))
    with pytest.raises(StoreError, match="quantized.json"):
        QuantizedModel.load(tmp_path / "nowhere", net())
    layout = json.loads((tmp_path / "quantized.json").read_text())
    layout["quantized"][0][1][0] = 10**6
    (tmp_path / "quantized.json").write_text(json.dumps(layout))
    with pytest.raises(DamagedFileError, match="quantised"):
        QuantizedModel.load(tmp_path, net())
    with pytest.raises(RoleError, match="no parameter"):
        QuantizedModel(nn.Linear(2, 2), {"weight": encode(torch.zeros(3, 2), 4)})
