"""UNIC: tokens of any vision transformer, the ladder, running standardisation, teacher dropping."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.data.shapes import FACTORS, shape_factors
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.evaluate.probes import linear_probe, probe_tasks
from stillhouse.measures.tokens import cosine_and_smooth_l1, kept_teachers
from stillhouse.models.convnets import TinyConvNet
from stillhouse.models.vit import SmallMixer, SmallViT
from stillhouse.parts.ladder import Ladder
from stillhouse.parts.standardise import Standardiser
from stillhouse.parts.taps import taps
from stillhouse.parts.tokens import resize_patches, similarity_of, token_places
from stillhouse.run import Run
from stillhouse.run.schedules import cosine
from stillhouse.systems.compression.unic import Config, distill, fit, louder, similarities, tiny


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def vit(seed=0, **options):
    torch.manual_seed(seed)
    return SmallViT(**{"channels_in": 1, "classes": 0, "image_size": 8, "patch": 4, "width": 8, "depth": 2, "heads": 2,
                       **options})


def pictures(n=12):
    g = torch.Generator().manual_seed(0)
    return TensorSet(image=torch.rand(n, 1, 8, 8, generator=g) * 2 - 1)


SMALL = Config(steps=6, batch=6, lr=0.01, hidden=4, last_hidden=6, smallest_crop=1.0, colour=0.0)

# -------------------------------------------------------------------- tokens


def test_tokens_of_the_embedded_transformer():
    model, image = vit(depth=3), torch.randn(4, 1, 8, 8)
    where = token_places(model, image)
    assert where.blocks == ("blocks.0", "blocks.1", "blocks.2") and where.end == "norm"
    assert (where.prefix, where.patches, where.width) == (1, 4, 8)
    with taps(model, [where.end]) as features:
        out = model(image)
    split = where.split(features[where.end])
    torch.testing.assert_close(split["cls"], out, rtol=0, atol=0)
    torch.testing.assert_close(split["patch"], model.tokens(image)[:, 1:], rtol=0, atol=0)


@pytest.mark.parametrize("model", [vit(class_token=False), SmallMixer(1, 3, 8, 4, width=8, depth=2)])
def test_without_a_class_token_it_is_the_mean_of_the_patches(model):
    image = torch.randn(4, 1, 8, 8)
    where = token_places(model, image)
    assert (where.prefix, where.patches) == (0, 4)
    with taps(model, [where.end]) as features:
        model(image)
    split = where.split(features[where.end])
    torch.testing.assert_close(split["cls"], split["patch"].mean(1))


def test_a_model_without_tokens_is_refused_and_every_model_is_left_as_it_was():
    with pytest.raises(RoleError, match="no column of blocks"):
        token_places(TinyConvNet(), torch.randn(2, 1, 8, 8))
    model = vit().train()
    token_places(model, torch.randn(2, 1, 8, 8))
    assert all(m.training and not m._forward_hooks for m in model.modules())


def dinov2(registers=0, **options):
    import transformers

    config = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 16,
              "patch_size": 4, **options}
    if registers:
        return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
            num_register_tokens=registers, **config))
    return transformers.Dinov2Model(transformers.Dinov2Config(**config))


def transformers_models():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8,
             "image_size": 16, "patch_size": 4}
    return {
        "vit": (transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=3, **small)), 1, "layernorm"),
        "deit": (transformers.DeiTModel(transformers.DeiTConfig(**small)), 2, "layernorm"),
        "dinov2": (dinov2(), 1, "layernorm"),
        "registers": (dinov2(registers=3), 4, "layernorm"),
        "clip": (transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**small)), 1, "layers.1"),
        "siglip": (transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**small)), 0, "post_layernorm"),
    }


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "registers", "clip", "siglip"])
def test_tokens_of_transformers(name):
    model, prefix, end = transformers_models()[name]
    image = torch.randn(2, 3, 16, 16)
    where = token_places(model, image)
    assert (len(where.blocks), where.prefix, where.patches, where.width) == (2, prefix, 16, 8)
    assert where.end.endswith(end)
    with torch.no_grad(), taps(model.eval(), [where.end]) as features:
        out = model(image, output_hidden_states=True)
    if hasattr(out, "last_hidden_state"):
        torch.testing.assert_close(features[where.end], out.last_hidden_state)


def test_patches_are_laid_on_another_grid():
    x = torch.arange(4.0).view(1, 4, 1).expand(2, 4, 3)
    assert resize_patches(x, 4) is x
    assert resize_patches(x, 1).squeeze().tolist() == [[1.5] * 3] * 2
    constant = torch.full((2, 16, 5), 0.3)
    torch.testing.assert_close(resize_patches(constant, 9), torch.full((2, 9, 5), 0.3))
    with pytest.raises(DataError, match="not both square"):
        resize_patches(torch.randn(1, 6, 2), 4)


# -------------------------------------------------------------------- the ladder


def splits(n=5, width=8, count=2, dtype=torch.float32):
    return [{"cls": torch.randn(n, width, dtype=dtype), "patch": torch.randn(n, 4, width, dtype=dtype)}
            for _ in range(count)]


def test_a_ladder_is_a_sum_over_the_blocks():
    ladder = Ladder(8, [6, 3], 2, hidden=4, last=5)
    rungs = splits()
    out = ladder(rungs)
    assert [s["cls"].shape for s in out] == [(5, 6), (5, 3)] and out[1]["patch"].shape == (5, 4, 3)
    for t in range(2):
        for kind in ("cls", "patch"):
            apart = [projector(rung[kind]) for projector, rung in zip(ladder.teachers[t][kind], rungs, strict=True)]
            torch.testing.assert_close(out[t][kind], apart[0] + apart[1])
    linears = [m for m in ladder.modules() if isinstance(m, nn.Linear)]
    assert {m.out_features for m in linears} == {4, 5, 6, 3} and all(m.bias.abs().max() == 0 for m in linears)
    assert all(m.weight.abs().max() < 0.1 for m in linears)
    assert any(isinstance(m, nn.GELU) for m in ladder.modules())


def test_a_ladder_of_the_last_block_is_one_projector():
    """Same weights, inner rungs of 0: the ordinary single-projector student."""
    whole, single = Ladder(8, [6], 3, 4, 5), Ladder(8, [6], 1, 4, 5)
    for kind in ("cls", "patch"):
        single.teachers[0][kind][0].load_state_dict(whole.teachers[0][kind][-1].state_dict())
        for inner in whole.teachers[0][kind][:-1]:
            nn.init.zeros_(inner[-1].weight)
    rungs = splits(count=3)
    for kind in ("cls", "patch"):
        torch.testing.assert_close(whole(rungs)[0][kind], single(rungs[-1:])[0][kind], rtol=0, atol=1e-7)
    linear = Ladder(8, [6], 1, 4, 0)
    assert len(list(linear.parameters())) == 4


def test_the_ladder_reaches_every_block_directly_and_the_last_alone_only_through_it():
    for which in ("all", "last"):
        student = vit(1, depth=3)
        match = fit([vit(2)], student, pictures(), dataclasses.replace(SMALL, ladder=which, steps=0), Run(quiet=True))
        assert len(match.blocks) == (3 if which == "all" else 1) and match.blocks[-1] == "blocks.2"


def test_without_the_ladder_the_encoder_is_bit_for_bit_the_same():
    student, teachers, data = vit(1), [vit(2), vit(3, width=4)], pictures()
    match = fit(teachers, student, data, SMALL, Run(quiet=True))
    student.eval()
    with torch.no_grad(), taps(student, match.blocks) as features:
        within = student(data.image)
        match.ladder([match.own.split(features[b]) for b in match.blocks])
    del match
    with torch.no_grad():
        assert torch.equal(student(data.image), within)
    returned = distill(teachers, again := vit(1), data, SMALL, Run(quiet=True))
    assert returned is again and list(returned.state_dict()) == list(vit().state_dict())
    assert torch.equal(returned.eval()(data.image), within)


# -------------------------------------------------------------------- standardisation


def test_statistics_are_those_of_the_batches():
    torch.manual_seed(0)
    norm, x = Standardiser(3).double(), torch.randn(4, 7, 3, dtype=torch.float64) * 5 + 2
    torch.testing.assert_close(norm(x), x, rtol=1e-7, atol=0)
    norm.update(x, 1.0)
    flat = norm(x).flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(flat.std(0), torch.ones(3).double(), atol=1e-7, rtol=0)
    y, before = torch.randn(9, 3, dtype=torch.float64), norm.mean.clone()
    norm.update(y, 0.25)
    torch.testing.assert_close(norm.mean, 0.75 * before + 0.25 * y.mean(0))
    torch.testing.assert_close(norm.std, 0.75 * x.flatten(0, 1).std(0) + 0.25 * y.std(0))
    with pytest.raises(DataError):
        norm.update(y[:1], 0.5)
    with pytest.raises(ConfigError):
        norm.update(y, 1.5)


def test_targets_do_not_know_shift_and_scale():
    """Over batches whose statistics follow (m = 1 at first), in float64: equal targets for f and a f + b."""
    torch.manual_seed(0)
    a, b = torch.rand(3, dtype=torch.float64) * 9 + 0.1, torch.randn(3, dtype=torch.float64) * 4
    plain, changed = Standardiser(3, eps=0.0).double(), Standardiser(3, eps=0.0).double()
    for k in range(5):
        x = torch.randn(20, 3, dtype=torch.float64)
        if k:
            torch.testing.assert_close(plain(x), changed(a * x + b), rtol=1e-9, atol=1e-9)
        m = 0.001 + 0.999 * cosine(k / 5)
        plain.update(x, m)
        changed.update(a * x + b, m)


def test_a_loud_teacher_changes_nothing_after_the_first_step_but_does_without_standardising():
    """Steps at a learning rate of 0 move the statistics only: the losses of a teacher and of the same times ten."""
    def losses(teacher, **changes):
        run = Run(quiet=True)
        fit([teacher], vit(1), pictures(), dataclasses.replace(SMALL, lr=1e-12, min_lr=0.0, drop=0.0, **changes), run)
        return torch.tensor([line["match"] for line in run.history])

    quiet, loud = losses(vit(2)), losses(louder(vit(2)))
    assert loud[0] > 2 * quiet[0]
    torch.testing.assert_close(loud[1:], quiet[1:], rtol=1e-3, atol=1e-4)
    quiet, loud = (losses(t, standardise=False) for t in (vit(2), louder(vit(2))))
    assert (loud > 2 * quiet).all()


def test_targets_are_standardised_before_the_statistics_take_in_the_batch():
    """One step: the statistics are still 0 and 1, the targets the raw tokens; after it they are the batch's."""
    data, teacher, run = pictures(6), vit(2), Run(quiet=True)
    match = fit([teacher], vit(1), data, dataclasses.replace(SMALL, steps=1, batch=6), run)
    tokens = teacher.tokens(data.image).detach()
    torch.testing.assert_close(match.statistics[0]["cls"].mean, tokens[:, 0].mean(0))
    torch.testing.assert_close(match.statistics[0]["patch"].std, tokens[:, 1:].flatten(0, 1).std(0))


# -------------------------------------------------------------------- loss and dropping


def test_the_loss_of_a_token():
    s, f = torch.randn(2, 5, 8, dtype=torch.float64)
    cos = (s * f).sum(-1) / s.norm(dim=-1) / f.norm(dim=-1)
    gap = (s - f).abs()
    smooth = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean(-1)
    torch.testing.assert_close(cosine_and_smooth_l1(s, f), 0.5 * (1 - cos) + 0.5 * smooth)
    torch.testing.assert_close(cosine_and_smooth_l1(s, f, 1.0, 0.0), 1 - cos)
    torch.testing.assert_close(cosine_and_smooth_l1(s, f, 0.0, 1.0), smooth)
    assert cosine_and_smooth_l1(f, f).abs().max() < 1e-12


def test_dropping_keeps_the_farthest_and_the_stated_number():
    torch.manual_seed(0)
    losses = torch.rand(4, 20_000, dtype=torch.float64)
    u = torch.rand(4, 20_000)
    worst = losses.argmax(0)
    for p in (0.0, 0.3, 0.5, 1.0):
        kept = kept_teachers(losses, u, p)
        assert kept.gather(0, worst[None]).all()
        assert kept.sum(0).double().mean().item() == pytest.approx(1 + 3 * (1 - p), abs=0.02)
    all_kept, only = kept_teachers(losses, u, 0.0), kept_teachers(losses, u, 1.0)
    assert all_kept.all() and torch.equal(only.sum(0), torch.ones(20_000).long())
    weighted = [(c * losses).sum() / c.sum() for c in (all_kept, only)]
    torch.testing.assert_close(weighted[0], losses.mean())
    torch.testing.assert_close(weighted[1], losses.amax(0).mean())
    tied = kept_teachers(torch.ones(3, 7), torch.zeros(3, 7), 1.0)
    assert torch.equal(tied.sum(0), torch.ones(7).long())


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_step_is_that_of_the_equations(drop):
    """The first logged loss, computed by hand from the fresh ladder (the statistics are 0 and 1)."""
    data, teachers = pictures(6), [vit(2), vit(3, width=4, depth=1)]
    config = dataclasses.replace(SMALL, steps=1, batch=6, drop=drop)
    match = fit(teachers, student := vit(1), data, dataclasses.replace(config, steps=0), Run(quiet=True))
    with torch.no_grad():
        with taps(student, match.blocks) as features:
            student(data.image)
        said = match.ladder([match.own.split(features[b]) for b in match.blocks])
        each = []
        for s, teacher in zip(said, teachers, strict=True):
            f = teacher.tokens(data.image)
            token = [0.5 * (1 - F.cosine_similarity(a, b, dim=-1))
                     + 0.5 * F.smooth_l1_loss(a, b, reduction="none").mean(-1)
                     for a, b in ((s["cls"], f[:, 0]), (s["patch"], f[:, 1:]))]
            each.append((token[0] + token[1].mean(1)) / 2)
    losses = torch.stack(each)
    run = Run(quiet=True)
    fit(teachers, vit(1), data, config, run)
    expected = losses.mean() if drop == 0 else losses.amax(0).mean()
    assert run.history[0]["match"] == pytest.approx(expected.item(), rel=1e-5)
    assert run.history[0]["teacher 1"] == pytest.approx(losses[1].mean().item(), rel=1e-5)


def test_it_learns_and_brings_both_teachers_near():
    data, teachers, student = pictures(24), [vit(2), vit(3)], vit(1)
    config = dataclasses.replace(SMALL, steps=200, batch=12, lr=0.01, hidden=16, last_hidden=16)
    before = similarities(fit(teachers, vit(1), data, dataclasses.replace(config, steps=2), Run(quiet=True)), teachers,
                          vit(1), data.image)
    after = similarities(fit(teachers, student, data, config, Run(quiet=True)), teachers, student, data.image)
    assert min(after) > 0.6 > max(before)
    assert similarity_of(*[splits(count=1)[0]] * 2).item() == pytest.approx(1)


# -------------------------------------------------------------------- what goes in


def test_teachers_of_other_widths_grids_and_with_classes():
    teachers = [vit(2, width=4, depth=1, patch=2), vit(3, classes=5), vit(4, class_token=False, patch=1, depth=1)]
    student = vit(1)
    before = state(student)
    distill(teachers, student, pictures(), SMALL, Run(quiet=True))
    assert any(not torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_random_views_are_drawn():
    student = vit(1)
    distill([vit(2)], student, pictures(), dataclasses.replace(SMALL, smallest_crop=0.3, colour=0.5), Run(quiet=True))
    assert all(torch.isfinite(v).all() for v in student.state_dict().values())


def test_bad_input_is_named():
    data = pictures()
    with pytest.raises(RoleError, match="at least one teacher"):
        distill([], vit(), data)
    with pytest.raises(RoleError, match="TinyConvNet has no column"):
        distill([TinyConvNet()], vit(), data)
    with pytest.raises(RoleError, match=r"teachers\[0\]"):
        distill([vit(channels_in=3)], vit(), data)
    for wrong in ({"ladder": "first"}, {"loss": "l1"}, {"drop": 1.5}, {"patch": -0.1}, {"hidden": -1},
                  {"smallest_crop": 0.0}, {"colour": -1.0}, {"min_lr": 1.0}, {"momentum": 2.0}):
        with pytest.raises(ConfigError):
            Config(**wrong)


def test_real_classes_from_folders_of_transformers(tmp_path):
    """A DINOv2 with another grid and width, a supervised ViT and a CLIP tower teach a DINOv2 with registers."""
    pytest.importorskip("transformers")
    from stillhouse.hub.models import resolve_model
    from stillhouse.protocols import Encoder

    made = transformers_models()
    torch.manual_seed(0)
    models = {"wide": dinov2(hidden_size=12, image_size=24), **{n: made[n][0] for n in ("vit", "clip", "registers")}}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    loaded = {name: resolve_model(f"hf:{tmp_path / name}", Encoder) for name in models}
    student = loaded.pop("registers")
    data = TensorSet(image=torch.rand(12, 3, 16, 16) * 2 - 1)
    before = state(student)
    distill(list(loaded.values()), student, data, SMALL, Run(quiet=True))
    changed = [k for k, v in student.state_dict().items() if not torch.equal(v, before[k])]
    assert any("layer.0" in k for k in changed) and any("layer.1" in k for k in changed)
    assert student(data.image[:2]).shape == (2, 8)


# -------------------------------------------------------------------- the ground of the experiment


def test_factors_are_independent_and_each_a_quarter():
    data = shape_factors(4000, seed=1)
    assert set(data.fields) >= set(FACTORS) and "label" not in data.fields
    assert data.image.shape == (4000, 3, 16, 16) and data.image.abs().max() <= 1
    for name in FACTORS:
        assert (torch.bincount(data.data[name], minlength=4) / 4000 - 0.25).abs().max() < 0.03
        for other in FACTORS:
            if other != name:
                both = torch.bincount(4 * data.data[name] + data.data[other], minlength=16) / 4000
                assert (both - 1 / 16).abs().max() < 0.02
    assert torch.equal(shape_factors(50, seed=1).image, shape_factors(50, seed=1).image)


def test_probes_of_several_tasks_are_the_single_ones():
    torch.manual_seed(0)
    x, test = torch.randn(60, 4), torch.randn(30, 4)
    labels = {"sign": (x[:, 0] > 0).long(), "other": (x[:, 1] > 0.3).long()}
    wanted = {"sign": (test[:, 0] > 0).long(), "other": (test[:, 1] > 0.3).long()}
    found = probe_tasks(x, test, labels, wanted)
    assert found == {t: linear_probe(x, labels[t], test, wanted[t]) for t in labels}


def test_a_run_is_the_same_twice():
    results = []
    for _ in range(2):
        given = tiny()
        distill(**given, run=Run(quiet=True))
        results.append(state(given["student"]))
    torch.testing.assert_close(*results, rtol=0, atol=0)
