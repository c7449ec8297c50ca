"""AMD: gates and slices are one thing, slices are nested, the criteria, the phases, and real models."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import stillhouse
from stillhouse.deploy import targets
from stillhouse.errors import ConfigError, DamagedFileError, RoleError
from stillhouse.evaluate.cost import parameters
from stillhouse.hub.models import resolve_model
from stillhouse.measures.scales import first_choice, npsd, tradeoff
from stillhouse.models.convnets import TinyConvNet
from stillhouse.models.vit import SmallMixer, SmallViT
from stillhouse.parts.nested import (
    Headless,
    Nested,
    Slice,
    cut,
    gated,
    groups,
    least_share,
    masks,
    slice_of,
    sliced,
    taylor,
)
from stillhouse.parts.taps import taps
from stillhouse.protocols import Classifier
from stillhouse.recipes import nested
from stillhouse.run import Run
from stillhouse.systems.compression.amd import Config, Job, distill, tiny
from stillhouse.testing import target_digest


def vit(**changes):
    torch.manual_seed(0)
    return shaken(SmallViT(1, 4, 8, 4, **{"width": 12, "depth": 2, "heads": 3, **changes}))


def shaken(model):
    """With biases, norms and position tables that are not at their start."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def real(kind):
    """A tiny random model of a real class, as the library's strings give it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    same = {"image_size": 8, "num_channels": 1, "num_labels": 4, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0}
    if kind == "ViT":
        config = transformers.ViTConfig(hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
                                        intermediate_size=10, patch_size=4, **same)
    else:
        config = transformers.SwinConfig(embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=2, patch_size=2,
                                         drop_path_rate=0.0, mlp_ratio=2.0, **same)
    return shaken(getattr(transformers, f"{kind}ForImageClassification")(config))


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return self.model(image).logits


MODELS = {"vit": vit, "mixer": lambda: shaken(SmallMixer(1, 4, 8, 4, 12, 2, 6, 10)),
          "ViT": lambda: Logits(real("ViT")), "Swin": lambda: Logits(real("Swin"))}


def some(model, seed=0):
    """About half of the units, of the first attention none and of one perceptron none."""
    generator = torch.Generator().manual_seed(seed)
    kept = {path: sorted(torch.randperm(g.n, generator=generator)[: g.n // 2].tolist())
            for path, g in groups(model).items()}
    for kind in ("head", "unit"):
        first = next((path for path, g in groups(model).items() if g.kind == kind), None)
        if first is not None:
            kept[first] = []
    return kept


@pytest.mark.parametrize("name", MODELS)
def test_a_gate_of_0_and_a_slice_give_the_same_logits(name):
    model = MODELS[name]().double()
    x, kept = torch.randn(3, 1, 8, 8).double(), some(model)
    before = deepcopy(model.state_dict())
    with torch.no_grad():
        whole = model(x)
        with gated(model, masks(model, kept)):
            masked = model(x)
        with sliced(model, kept):
            narrow = model(x)
        small = slice_of(model, kept)
        torch.testing.assert_close(narrow, masked, rtol=0, atol=1e-10)
        torch.testing.assert_close(small(x), masked, rtol=0, atol=1e-10)
        assert (masked - whole).abs().max() > 1e-3
        torch.testing.assert_close(model(x), whole, rtol=0, atol=0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert not any(m._forward_pre_hooks for m in model.modules())
    lost = sum(g.cost * (g.n - len(kept[path])) for path, g in groups(model).items())
    assert parameters(small) == parameters(model) - lost


@pytest.mark.parametrize("name", ["vit", "Swin"])
def test_gradients_of_a_slice_on_shared_weights_are_those_of_the_gated_model(name):
    model = MODELS[name]().double()
    x, kept = torch.randn(3, 1, 8, 8).double(), some(model, seed=1)
    with gated(model, masks(model, kept)):
        one = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), allow_unused=True,
                                  materialize_grads=True)
    with sliced(model, kept):
        z = model(x)
    two = torch.autograd.grad(z.square().sum(), list(model.parameters()), allow_unused=True, materialize_grads=True)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["vit", "ViT", "Swin"])
def test_the_importance_of_a_unit_is_the_mean_of_the_absolute_gate_gradients_of_the_pictures(name):
    model = MODELS[name]().double()
    batch = {"image": torch.randn(5, 1, 8, 8).double(), "label": torch.arange(5) % 4}
    found = taylor(model, iter([{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]),
                   nested._each_loss)
    for path, group in groups(model).items():
        inputs = []
        handle = group.out.register_forward_pre_hook(lambda m, a, kept=inputs: kept.append(a[0]))
        total = torch.zeros(group.n).double()
        for i in range(5):
            inputs.clear()
            loss = F.cross_entropy(model(batch["image"][i : i + 1]), batch["label"][i : i + 1])
            (grad,) = torch.autograd.grad(loss, inputs[0])
            total += (inputs[0] * grad).flatten(0, -2).sum(0).unflatten(0, (group.n, group.wide)).sum(1).abs().detach()
        handle.remove()
        torch.testing.assert_close(found[path], total / 5)


def order_of(model):
    torch.manual_seed(1)
    return Nested(model, [torch.rand(g.n, dtype=torch.double) for g in groups(model).values()])


@pytest.mark.parametrize("name", MODELS)
def test_slices_of_one_ranking_are_nested_and_as_large_as_said(name):
    model = MODELS[name]()
    order = order_of(model)
    before, units = None, -1
    for scale in (order.least + 0.05, 0.5, 0.7, 0.9, 1.0):
        n = order.units(scale)
        kept = order.kept(n)
        assert parameters(slice_of(model, kept)) == order.parameters[n]
        assert order.share(n) == order.parameters[n] / parameters(model)
        gaps = [abs(p / order.total - scale) for p in order.parameters]
        assert gaps[n] == min(gaps) and n >= units
        assert before is None or all(set(before[path]) <= set(kept[path]) for path in kept)
        before, units = kept, n
    assert units == len(order.order) == sum(g.n for g in groups(model).values())
    assert order.least == pytest.approx(least_share(model)) and order.parameters[-1] == parameters(model)
    for bad in (order.least, 1.1):
        with pytest.raises(ConfigError, match="out of reach"):
            order.units(bad)


def test_both_kinds_lose_the_same_part_of_their_units_the_least_important_first():
    model = vit()
    scores = [torch.arange(1.0, g.n + 1) for g in groups(model).values()]
    order = Nested(model, scores)
    sizes = {kind: sum(g.n for g in groups(model).values() if g.kind == kind) for kind in ("head", "unit")}
    for n in range(len(order.order)):
        kept = order.kept(n)
        parts = [sum(len(kept[p]) for p, g in groups(model).items() if g.kind == kind) / sizes[kind]
                 for kind in ("head", "unit")]
        assert abs(parts[0] - parts[1]) <= 1 / sizes["head"]
        assert all(rows == list(range(groups(model)[p].n - len(rows), groups(model)[p].n)) for p, rows in kept.items())
    scaled = Nested(model, [s * (10 if i == 0 else 1) for i, s in enumerate(scores)])
    assert scaled.order == order.order


def test_npsd_and_the_trade_off():
    s, p = torch.tensor([0.5, 0.2]).double(), torch.tensor([0.85, 0.60]).double()
    torch.testing.assert_close(npsd(p, s, 0.9), torch.tensor([-0.1, -0.375]).double())
    assert first_choice(npsd(p, s, 0.9), s) == 0
    torch.testing.assert_close(npsd(p + 0.07, s, 0.97), npsd(p, s, 0.9))
    assert npsd(torch.tensor([0.95]), torch.tensor([0.99]), 0.9).item() == 0
    better = torch.tensor([0.95, 0.91, 0.5]).double()
    assert first_choice(npsd(better, torch.tensor([0.8, 0.4, 0.2]).double(), 0.9),
                        torch.tensor([0.8, 0.4, 0.2]).double()) == 1
    torch.testing.assert_close(tradeoff(p, s), torch.tensor([0.95, 0.76]).double())
    with pytest.raises(ConfigError, match="smaller than their teacher"):
        npsd(p, torch.tensor([1.0, 0.2]), 0.9)


def given(**changes):
    made = tiny()
    return {**made, "config": replace(made["config"], sampling="all", view=0.0, **changes)}


def test_with_the_teacher_as_only_candidate_it_is_direct_distillation():
    roles = given(candidates=(1.0,))
    student = distill(**roles, run=Run(quiet=True))
    run = Run(quiet=True).begin()
    teacher, config = roles["teacher"], roles["config"]
    order = nested.ranking(teacher, roles["labelled"], config.phase(0), run)
    other = slice_of(teacher, order.kept(order.units(config.scale)))
    nested.mimic(teacher, other, roles["labelled"], config.phase(config.steps, config.student_lr),
                 run, "student")
    assert target_digest(student) == target_digest(other)
    assert student.table == []


def test_a_joint_step_is_the_mean_of_the_candidates_losses_on_one_set_of_weights():
    roles = given(optimizer="sgd", clip=None, weight_decay=0.0, lr=0.1, warmup=0.0, joint=1 / 6)
    job = Job(roles["teacher"], roles["labelled"], roles["validation"], None, roles["config"], Run(quiet=True).begin())
    net, reference = deepcopy(job.teacher), deepcopy(job.teacher)
    seen = []
    config = roles["config"].phase(1)
    nested.jointly(job.teacher, net, job.kept, job.labelled, config, job.run,
                   view=lambda x: (seen.append(x.clone()), x)[1])
    label = torch.stack([roles["labelled"].label[(roles["labelled"].image == x).flatten(1).all(1)][0] for x in seen[0]])
    path = nested.last_hidden(job.teacher, seen[0])[0]
    assert path == job.path == "blocks.0"
    total = 0
    for kept in job.kept:
        with taps(job.teacher, [path]) as h_t, taps(reference, [path]) as h_s:
            with torch.no_grad():
                z_t = job.teacher(seen[0])
            with gated(reference, masks(reference, kept)):
                z_s = reference(seen[0])
            total = total + sum(nested.composite((z_t, h_t[path]), (z_s, h_s[path]), label, config).values())
    grads = torch.autograd.grad(total / len(job.kept), list(reference.parameters()))
    for p, new, g in zip(reference.parameters(), net.parameters(), grads, strict=True):
        torch.testing.assert_close(new, p - 0.1 * g, rtol=1e-4, atol=1e-6)


def test_sandwich_takes_the_smallest_the_largest_and_one_between():
    run = Run(quiet=True).begin()
    seen = [nested.sandwich(5, run) for _ in range(50)]
    assert all(c[0] == 0 and c[-1] == 4 and len(c) == 3 for c in seen) and len({c[1] for c in seen}) == 3
    assert nested.sandwich(2, run) == [0, 1] and nested.sandwich(1, run) == [0]


@pytest.mark.parametrize("changes", [{"selector": "worst"}, {"selector": "tradeoff"}, {"sharing": "separate"},
                                     {"ranking": "random"}, {"hidden": 0.0}, {"kd": 0.0, "ce": 0.0},
                                     {"candidates": (0.8,)}, {"search": "exhaustive"}])
def test_every_way_gives_a_student_of_the_wanted_scale(changes):
    roles = given(**changes)
    student = distill(**roles, run=Run(quiet=True))
    order = order_of(roles["teacher"])
    assert isinstance(student, Slice)
    wanted = roles["config"].scale * parameters(roles["teacher"])
    assert abs(parameters(student) - wanted) <= max(order.costs.values())
    assert [row["wanted"] for row in student.table] == list(roles["config"].candidates)
    assert sum(row["chosen"] for row in student.table) == 1


def test_the_table_follows_the_criteria():
    roles = given()

    def chosen(selector, performance, of_teacher=0.9):
        config = replace(roles["config"], selector=selector)
        job = Job(roles["teacher"], roles["labelled"], roles["validation"], None, config, Run(quiet=True).begin())
        table = job.table(performance, of_teacher)
        assert [row["parameters"] / parameters(roles["teacher"]) for row in table] == [row["scale"] for row in table]
        return [i for i, row in enumerate(table) if row["chosen"]]

    assert chosen("npsd", [0.88, 0.88, 0.89]) == [0]
    assert chosen("npsd", [0.2, 0.9, 0.95]) == [1]
    assert chosen("worst", [0.85, 0.88, 0.89]) == [2]
    assert chosen("tradeoff", [0.5, 0.88, 0.885]) == [1]


def test_the_student_is_a_slice_of_the_assistant():
    torch.manual_seed(0)
    teacher = vit()
    order = order_of(teacher)
    large, small = (order.kept(order.units(s)) for s in (0.8, 0.3))
    assistant = slice_of(teacher, large)
    student = assistant.smaller(small)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(student(x), slice_of(teacher, small)(x), rtol=0, atol=0)
    assert student.kept == {path: list(rows) for path, rows in small.items()}
    assert all(p.requires_grad for p in student.parameters())
    assert not {id(p) for p in student.parameters()} & {id(p) for p in assistant.parameters()}
    with pytest.raises(RoleError, match="no longer has"):
        student.smaller(large)
    with pytest.raises(RoleError, match="does not fit"):
        cut(deepcopy(teacher), {**large, "blocks.0.attn": [7]})


def test_a_student_of_another_kind_is_taught_through_a_projector():
    roles = given()
    student = TinyConvNet(1, 4, width=4)
    before = deepcopy(student.state_dict())
    run = Run(quiet=True)
    assert distill(**roles, student=student, run=run) is student
    assert not torch.equal(before["net.0.weight" if "net.0.weight" in before else next(iter(before))],
                           next(iter(student.state_dict().values())))
    assert [h["hidden"] for h in run.history if h["stage"] == "student"]
    other = TinyConvNet(1, 4, width=4)
    assert distill(**given(search="exhaustive"), student=other, run=Run(quiet=True)) is other


def test_a_saved_slice_is_loaded_back(tmp_path):
    roles = given()
    roles["teacher"] = resolve_model("vit:classes=4,image_size=8,width=8,depth=1,heads=2", Classifier)
    student = distill(**roles, run=Run(quiet=True)).eval()
    targets.save(student, tmp_path, targets.about_run("amd", roles, roles["config"]))
    loaded = stillhouse.load(tmp_path)
    assert isinstance(loaded, Slice) and loaded.table == student.table and loaded.kept == student.kept
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(loaded(x), student(x), rtol=0, atol=0)
    again = resolve_model(str(tmp_path), Classifier)
    torch.testing.assert_close(again(x), student(x), rtol=0, atol=0)
    with pytest.raises(RoleError, match="not those of this architecture"):
        Slice.load(tmp_path, SmallViT(1, 7, 8, 4, width=8, depth=1, heads=2))
    (tmp_path / "slice.json").write_text(json.dumps({"kept": 3}))
    with pytest.raises(DamagedFileError, match="not as it was written"):
        Slice.load(tmp_path, SmallViT(1, 4, 8, 4, width=8, depth=1, heads=2))


@pytest.mark.parametrize("kind", ["ViT", "Swin"])
def test_it_runs_on_models_of_transformers(kind, tmp_path):
    model = real(kind)
    model.save_pretrained(tmp_path / "teacher")
    teacher = resolve_model(f"hf:{tmp_path / 'teacher'}", Classifier)
    roles = given(scale=0.55)
    roles["teacher"] = teacher
    student = distill(**roles, run=Run(quiet=True)).eval()
    x = torch.randn(2, 1, 8, 8)
    assert parameters(student) == student.table[0]["parameters"] or parameters(student) < parameters(teacher)
    targets.save(student, tmp_path / "out", targets.about_run("amd", roles, roles["config"]))
    loaded = stillhouse.load(tmp_path / "out")
    torch.testing.assert_close(loaded(x), student(x), rtol=0, atol=0)


def test_what_cannot_be_sliced_or_reached_is_refused_before_any_work():
    roles = given()
    with pytest.raises(RoleError, match="has no attention"):
        distill(**{**roles, "teacher": TinyConvNet(1, 4, width=4)}, run=Run(quiet=True))
    run = Run(quiet=True)
    with pytest.raises(RoleError, match="out of reach: without any head"):
        distill(**{**roles, "config": replace(roles["config"], scale=0.05)}, run=run)
    assert not run.begun
    for bad in ({"candidates": (0.3,)}, {"candidates": ()}, {"candidates": (0.8, 0.7)}, {"candidates": (0.8, 1.0)},
                {"scale": 1.0}, {"joint": 0.8, "assistant": 0.4}, {"selector": "best"}, {"kd": -1.0}, {"clip": 0.0},
                {"ce": 0.0, "kd": 0.0, "hidden": 0.0}, {"temperature": 0.0}, {"pictures": 0}):
        with pytest.raises(ConfigError):
            replace(roles["config"], **bad)
    assert Config().phase(7).steps == 7


def test_an_attention_without_heads_gives_its_output_bias():
    model = vit()
    kept = some(model)
    small = slice_of(model, kept).model
    assert isinstance(small.blocks[0].attn, Headless)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(small.blocks[0].attn(x), model.blocks[0].attn.proj.bias.expand(2, 5, 12))


def test_a_norm_between_the_linear_maps_keeps_a_module_whole():
    model = vit()
    model.blocks[0].mlp.norm = torch.nn.LayerNorm(24)
    assert "blocks.0.mlp" not in groups(model) and "blocks.1.mlp" in groups(model)


def test_kept_answers_of_the_teacher_change_nothing():
    one, two = (distill(**given(cache=cache), run=Run(quiet=True)) for cache in (False, True))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    student, cached = TinyConvNet(1, 4, width=4), given(cache=True)
    assert distill(**cached, student=student, run=Run(quiet=True)) is student
    with pytest.raises(ConfigError, match="random views"):
        replace(cached["config"], view=1.0)
