import json
import math
import wave
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from stillhouse.data.audio import read_sounds, read_wav
from stillhouse.data.readers import read_data
from stillhouse.data.sets import TensorSet
from stillhouse.data.tones import crops, tones, vocabulary
from stillhouse.errors import ConfigError, DamagedFileError, DataError, RoleError, StageError
from stillhouse.evaluate.cost import parameters
from stillhouse.hub.models import resolve_model
from stillhouse.hub.speech import load_pruned
from stillhouse.measures.matching import hidden_distance
from stillhouse.parts.gates import Gates, HardConcrete
from stillhouse.parts.lagrangian import Lagrangian
from stillhouse.parts.surgeon import (
    NoHeads,
    Pruned,
    RelativeAttention,
    cut,
    gated,
    hidden_states,
    layout,
    magnitude_masks,
    unmasked,
)
from stillhouse.protocols import SpeechData, SpeechEncoder
from stillhouse.recipes import masked_units
from stillhouse.run import Run, frozen
from stillhouse.systems.speech import dphubert
from stillhouse.systems.speech.dphubert import Config, Matching, distill, polish, prune, tiny
from stillhouse.testing import target_digest
from stillhouse.zoo.speech import hubert

LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


def real(kind, **changes):
    """A tiny random model of a real class."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, kind.replace("Model", "Config"))(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=20, conv_dim=[6, 8, 10],
        conv_kernel=[10, 8, 4], conv_stride=[8, 5, 2], num_feat_extract_layers=3, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=4, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        feat_proj_dropout=0.0, **changes)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def some_gates(model, kinds=("conv", "head", "unit"), skip=()):
    """Gates of which about half are closed."""
    sizes = {n: k for n, k in layout(model).sizes(kinds).items() if n not in skip}
    gates = Gates(sizes, least={n: int(n.startswith("conv")) for n in sizes})
    generator = torch.Generator().manual_seed(3)
    for gate in gates.groups.values():
        gate.log_alpha.data = torch.randn(len(gate.log_alpha), generator=generator) * 4 - 1.5
    return gates.to(next(model.parameters()).dtype).eval()


# ---------------------------------------------------------------------------------- gates and multipliers


def test_expected_size_and_fixed_mask():
    gate = HardConcrete(8)
    gate.log_alpha.data = torch.tensor([-4, -3, -2.2, -1.5, -0.5, 0.5, 2, 4], dtype=torch.float64)
    assert gate.kept().sum().item() == pytest.approx(4.7697524, abs=1e-6)
    mask = gate.mask()
    assert (mask == 0).tolist() == [True] * 3 + [False] * 5
    torch.testing.assert_close(mask[3:], torch.sigmoid(1.2 * gate.log_alpha.detach()[3:]))
    assert gate.mask(least=7).count_nonzero() == 7
    a = torch.tensor([4.6, 0.0, -3.0], dtype=torch.float64)
    gate.log_alpha.data = a
    torch.testing.assert_close(gate.kept(), torch.sigmoid(a + 1.5985968), atol=1e-7, rtol=0)


def test_frequency_of_open_gates_and_the_start():
    gate = HardConcrete(3)
    gate.log_alpha.data = torch.tensor([-2.0, -1.0, 1.0], dtype=torch.float64)
    u = torch.rand(200_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close((gate.sample(u) > 0).double().mean(0), gate.kept().detach(), atol=5e-3, rtol=0)
    assert float(HardConcrete(1000).kept().mean()) == pytest.approx(0.998, abs=5e-4)
    at_start = HardConcrete(5, std=0.0).mask()
    torch.testing.assert_close(at_start, torch.full((5,), 0.99598), atol=1e-5, rtol=0)


def test_a_draw_is_shared_and_fresh_each_time():
    gates = Gates({"a": 50}, drop=0.5)
    with pytest.raises(StageError):
        gates["a"]
    generator = torch.Generator().manual_seed(0)
    gates.draw(generator)
    first = gates["a"]
    assert torch.equal(first, gates["a"]) and first.requires_grad
    gates.draw(generator)
    assert not torch.equal(first, gates["a"])
    assert torch.equal(gates.eval()["a"], gates.masks()["a"])
    for bad in ({"drop": 0.0}, {"n": 0}, {"beta": 0.0}):
        with pytest.raises(ConfigError):
            HardConcrete(**{"n": 3, **bad})


def test_the_lagrangian_is_silent_on_target_and_climbs_below_it():
    lagrangian = Lagrangian().double()
    lagrangian.lambda1.data.fill_(-2.0)
    s = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    loss = lagrangian(s, 0.75)
    loss.backward()
    assert loss == 0 and lagrangian.lambda1.grad == 0 and lagrangian.lambda2.grad == 0 and s.grad == -2.0
    fresh = Lagrangian()
    optimizer = torch.optim.AdamW([fresh.group(0.1)], lr=1.0)
    fresh(torch.tensor(0.2), 0.75).backward()
    optimizer.step()
    assert fresh.lambda1 < 0 < fresh.lambda2


@pytest.mark.unchecked
def test_hidden_distance():
    h = torch.randn(2, 5, 8, dtype=torch.float64)
    assert float(hidden_distance(h, h)) == pytest.approx(-1.0)
    assert float(hidden_distance(2 * h, h)) == pytest.approx(float(h.abs().mean()) - 1)
    assert float(hidden_distance(h + 1, h, l1=0, cosine=0, squared=3)) == pytest.approx(3)
    with pytest.raises(ConfigError):
        hidden_distance(h, h[..., :4])


# ---------------------------------------------------------------------------------- the surgeon


@pytest.mark.parametrize("kind", ["HubertModel", "Wav2Vec2Model", "WavLMModel"])
def test_open_gates_change_nothing(kind):
    model = real(kind).double().eval()
    audio = torch.randn(2, 500, dtype=torch.float64)
    gates = Gates(layout(model).sizes()).double()
    for gate in gates.groups.values():
        gate.log_alpha.data.fill_(60.0)
    plain = hidden_states(model, audio, (0, 1, 3))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with torch.no_grad(), gated(model, gates):
        gates.draw(torch.Generator().manual_seed(0))
        assert all(bool((gates[name] == 1).all()) for name in gates.groups)
        sampled = hidden_states(model, audio, (0, 1, 3))
        gates.eval()
        fixed = hidden_states(model, audio, (0, 1, 3))
    for a, b, c in zip(plain, sampled, fixed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
        torch.testing.assert_close(a, c, atol=1e-9, rtol=0)
        assert float(hidden_distance(b, a)) == pytest.approx(-1.0, abs=1e-9)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not any(isinstance(m, RelativeAttention) for m in model.modules())


@pytest.mark.parametrize("skip", [("conv_2",), ()])
@pytest.mark.parametrize("kind", ["HubertModel", "Wav2Vec2Model", "WavLMModel"])
def test_the_cut_model_gives_what_the_gated_one_gives(kind, skip):
    """Also with the last convolution gated, thanks to the norm that counts removed channels as zeros."""
    model = real(kind).double().eval()
    audio = torch.randn(2, 500, dtype=torch.float64)
    gates = some_gates(model, skip=skip)
    with gated(model, gates), torch.no_grad():
        expected = hidden_states(model, audio, (0, 1, 2, 3))
        last = model(audio).last_hidden_state
    plan, masks = layout(model), gates.masks()
    kept = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    assert cut(model, masks) is model and isinstance(model, Pruned)
    with torch.no_grad():
        for a, b in zip(hidden_states(model, audio, (0, 1, 2, 3)), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)
        torch.testing.assert_close(model(audio).last_hidden_state, last, atol=1e-8, rtol=1e-6)
    assert parameters(model) == plan.count(kept) == layout(model).count()
    assert {n: k for n, k in layout(model).sizes().items() if n in kept} == kept
    with pytest.raises(RoleError, match="cut before"):
        cut(model, {})


@pytest.mark.parametrize("kind", ["HubertModel", "Wav2Vec2Model", "WavLMModel"])
def test_large_models_are_cut_and_counted_as_well(kind):
    """With a norm over channels inside the convolutions the cut is exact for heads and units alone."""
    model = real(kind, **LARGE).double().eval()
    audio = torch.randn(2, 500, dtype=torch.float64)
    whole, plan = deepcopy(model), layout(model)
    gates = some_gates(model, ("head", "unit"))
    with gated(model, gates), torch.no_grad():
        expected = hidden_states(model, audio, (3,))[0]
    cut(model, gates.masks())
    torch.testing.assert_close(hidden_states(model, audio, (3,))[0], expected, atol=1e-8, rtol=1e-6)
    masks = some_gates(whole).masks()
    cut(whole, masks)
    assert parameters(whole) == plan.count({n: int(m.count_nonzero()) for n, m in masks.items()})
    assert torch.isfinite(whole(audio).last_hidden_state).all()


@pytest.mark.parametrize("kind", ["HubertModel", "WavLMModel"])
def test_blocks_that_lose_everything(kind):
    model = real(kind).double().eval()
    audio = torch.randn(2, 500, dtype=torch.float64)
    masks = {"head_0": torch.zeros(4).double(), "unit_1": torch.zeros(20).double()}
    plan = layout(model)
    with gated(model, masks), torch.no_grad():
        expected = hidden_states(model, audio, (3,))[0]
    cut(model, masks)
    torch.testing.assert_close(hidden_states(model, audio, (3,))[0], expected, atol=1e-9, rtol=0)
    assert parameters(model) == plan.count({"head_0": 0, "unit_1": 0})
    assert kind == "WavLMModel" or isinstance(model.encoder.layers[0].attention, NoHeads)


def test_relative_attention_with_padding_is_that_of_wavlm():
    model = real("WavLMModel").double().eval()
    audio, mask = torch.randn(2, 800, dtype=torch.float64), torch.ones(2, 800, dtype=torch.long)
    mask[1, 400:] = 0
    gates = Gates(layout(model).sizes(("head",))).double().eval()
    for gate in gates.groups.values():
        gate.log_alpha.data.fill_(60.0)
    with torch.no_grad():
        expected = model(audio, attention_mask=mask).last_hidden_state
        with gated(model, gates):
            found = model(audio, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[0], expected[0], atol=1e-9, rtol=0)
    valid = expected.shape[1] // 2 - 1
    torch.testing.assert_close(found[1, :valid], expected[1, :valid], atol=1e-9, rtol=0)


def test_the_count_is_differentiable_and_that_of_the_model():
    model = real("HubertModel", **LARGE)
    plan = layout(model)
    assert plan.count() == parameters(model)
    gates = Gates(plan.sizes())
    gradient = torch.autograd.grad(plan.count(gates.kept()), list(gates.parameters()))
    assert all(bool((g > 0).all()) for g in gradient)
    c = torch.tensor([3.0, 4.0], requires_grad=True)
    plan.count({"conv_0": c[0], "conv_1": c[1]}).backward()
    assert c.grad[0] == 10 + 1 + 2 + 4 * 8 and c.grad[1] == 3 * 8 + 1 + 2 + 10 * 4
    with pytest.raises(RoleError, match="HubertModel"):
        layout(torch.nn.Linear(2, 2))


def test_magnitude_masks_fit_the_budget_and_keep_one_of_each():
    model = real("HubertModel")
    full = parameters(model)
    masks = magnitude_masks(model, full // 2)
    model.encoder.layers[0].feed_forward.intermediate_dense.weight.data[7] *= 100
    assert magnitude_masks(model, full // 2)["unit_0"][7] == 1
    assert parameters(cut(model, masks)) <= full // 2
    with pytest.raises(RoleError, match="one structure"):
        magnitude_masks(real("HubertModel"), 100)


def test_masks_that_do_not_fit_are_refused():
    for masks in ({"conv_0": torch.ones(5)}, {"tail_0": torch.ones(2)}, {"conv_1": torch.zeros(8)}):
        with pytest.raises(RoleError):
            cut(real("HubertModel"), masks)


# ---------------------------------------------------------------------------------- the system on real classes


@pytest.mark.parametrize("kind, changes", [("HubertModel", {}), ("HubertModel", LARGE), ("Wav2Vec2Model", {}),
                                           ("WavLMModel", {}), ("WavLMModel", LARGE)])
def test_distil_prune_save_and_load(kind, changes, tmp_path):
    import transformers

    real(kind, **changes).save_pretrained(tmp_path / "teacher")
    teacher = resolve_model(f"hf:{tmp_path / 'teacher'}", SpeechEncoder)
    assert type(teacher) is getattr(transformers, kind) and teacher.config.layerdrop > 0
    student = deepcopy(teacher)
    data = TensorSet(audio=torch.randn(8, 500))
    config = replace(tiny()["config"], layers=(0, 2, 3), steps=12, gate_lr=3.0, normalise=True)
    out = distill(teacher, student, data, config, Run(quiet=True))
    assert out is student and parameters(student) < 0.9 * parameters(teacher)
    assert student.config.layerdrop == teacher.config.layerdrop and student.config.apply_spec_augment
    student.save(tmp_path / "pruned")
    again = resolve_model(str(tmp_path / "pruned"), SpeechEncoder)
    assert isinstance(again, transformers.PreTrainedModel) and layout(again) == layout(student)
    torch.testing.assert_close(again(data.audio).last_hidden_state, student.eval()(data.audio).last_hidden_state)
    with pytest.raises(RoleError, match="load_pruned"):
        student.save_pretrained(tmp_path / "no")
    described = json.loads((tmp_path / "pruned" / "pruned.json").read_text())
    described["kept"]["unit_0"] = list(range(20))
    (tmp_path / "pruned" / "pruned.json").write_text(json.dumps(described))
    with pytest.raises(DamagedFileError):
        load_pruned(tmp_path / "pruned")


def test_arms_do_what_distill_does():
    given = tiny()
    expected = target_digest(distill(**given, run=Run(quiet=True)))
    run = Run(quiet=True).begin()
    teacher, student = given["teacher"], deepcopy(given["teacher"])
    with frozen(teacher), unmasked(student):
        match = Matching(teacher, student, given["data"], given["config"], run)
        prune(match, given["config"], run)
        deepcopy(student).eval()(given["data"].audio)
        polish(match, given["config"], run)
    assert target_digest(student) == expected


def test_cached_hidden_states_are_the_teachers():
    given = tiny()
    config = replace(given["config"], cache=True)
    with frozen(given["teacher"]):
        match = Matching(given["teacher"], given["student"], given["data"], config, Run(quiet=True))
        torch.testing.assert_close(match.data.hidden, match.targets(given["data"].audio))
        batch = match.data.batch(range(4))
        live = Matching(given["teacher"], given["student"], given["data"], given["config"], Run(quiet=True))
        torch.testing.assert_close(match.distance(batch), live.distance(batch))
        assert float(match.distance(batch).detach()) == pytest.approx(-1.0, abs=1e-5)
    distill(**{**given, "config": config}, run=Run(quiet=True))


def test_the_target_is_reached_and_choices_matter():
    base = replace(tiny()["config"], steps=60, gate_lr=0.5, lr=1e-3, second=0.0, sparsity_warmup=0.3)
    run = Run(quiet=True)
    distill(**{**tiny(), "config": base}, run=run)
    assert run.history[-1]["expected"] == pytest.approx(0.6, abs=0.2)
    heads = distill(**{**tiny(), "config": replace(base, units=("head", "unit"), sparsity=0.5)}, run=Run(quiet=True))
    assert [c[0] for c in layout(heads).convs] == [6, 8, 8]
    shot = tiny()
    distill(**{**shot, "config": replace(base, prune="magnitude", sparsity=0.5)}, run=Run(quiet=True))
    assert parameters(shot["student"]) <= parameters(shot["teacher"]) / 2
    other = hubert(8, 2, 2, 6, (4, 4, 4))
    distill(**{**tiny(), "student": other, "config": replace(base, units=())}, run=Run(quiet=True))
    assert not isinstance(other, Pruned)


def test_bad_input_is_refused():
    for changes in ({"units": ("row",)}, {"sparsity": 1.0}, {"second": 2.0}, {"layers": ()}, {"prune": "later"},
                    {"second_warmup": 1.0}, {"drop": 0.0}):
        with pytest.raises(ConfigError):
            Config(**changes)
    given = tiny()
    for changes, error in (({"student": hubert(8, 2, 2, 6, (4, 4, 4))}, RoleError),
                           ({"config": replace(given["config"], layers=(0, 3))}, RoleError),
                           ({"config": replace(given["config"], sparsity=0.99)}, ConfigError),
                           ({"data": TensorSet(image=torch.randn(3, 4))}, DataError)):
        run = Run(quiet=True)
        with pytest.raises(error):
            distill(**{**given, **changes}, run=run)
        assert not run.begun


def test_the_narrow_student_has_the_size_wanted():
    for wanted in (44_000, 61_000):
        model = dphubert.narrow(wanted)
        assert abs(parameters(model) / wanted - 1) < 0.01 and model.config.num_hidden_layers == 4


# ---------------------------------------------------------------------------------- sounds and the teacher


def test_tones_are_seeded_and_cropped():
    a, b = tones(6, seed=1), tones(6, seed=1)
    assert torch.equal(a.audio, b.audio) and a.audio.shape == (6, 4000) and not torch.equal(a.audio, tones(6).audio)
    assert len({tuple(w) for w in vocabulary().tolist()}) == 20
    assert torch.equal(crops(a, 500, seed=2).audio, crops(b, 500, seed=2).audio)
    spectrum = torch.fft.rfft(tones(1, noise=0.0).audio).abs()[0]
    assert spectrum[1960:].max() < 0.05 * spectrum.max()
    for bad in ({"n": 0}, {"seconds": 0}, {"words": 1000}):
        with pytest.raises(ConfigError):
            tones(**{"n": 2, **bad})


def test_sounds_are_read(tmp_path):
    def write(name, values, rate=8000, channels=1):
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(np.asarray(values, "<i2").tobytes())

    write("a.wav", [0, 16384, -16384, 0])
    write("b.wav", [1, 1, 3, 3, 5, 5], channels=2)
    sound, rate = read_wav(tmp_path / "a.wav")
    assert rate == 8000 and sound.tolist() == [0, 0.5, -0.5, 0]
    with pytest.raises(DataError, match="size"):
        read_sounds(tmp_path)
    data = read_data(tmp_path, SpeechData, size=2)
    assert data.audio.shape == (2, 2) and data.audio[0].tolist() == [0.5, -0.5]
    assert read_sounds(tmp_path, 5).audio[0].tolist() == [0, 0.5, -0.5, 0, 0]
    write("c.wav", [0, 0], rate=4000)
    with pytest.raises(DataError, match="rates"):
        read_sounds(tmp_path, 2)
    (tmp_path / "c.wav").write_bytes(b"no sound")
    with pytest.raises(DataError, match="c.wav"):
        read_sounds(tmp_path, 2)
    np.savez(tmp_path / "x.npz", audio=np.zeros((3, 50), "float32"))
    assert read_data(tmp_path / "x.npz", SpeechData).audio.shape == (3, 50)
    assert read_data("tones:n=3", SpeechData).audio.shape == (3, 4000)
    with pytest.raises(DataError, match="audio"):
        read_data("gauss2d:n=8", SpeechData)


def test_masked_units():
    u = torch.rand(50, 40, generator=torch.Generator().manual_seed(0))
    masked = masked_units.spans(u, 0.1, 5)
    assert masked.any(1).all() and float(masked.float().mean()) == pytest.approx(1 - 0.9**5, abs=0.05)
    one = torch.ones(1, 10)
    one[0, 3] = 0
    assert masked_units.spans(one, 0.0, 4)[0].tolist() == [False] * 3 + [True] * 4 + [False] * 3
    model = hubert(16, 1, 2, 16, (8, 8, 8))
    config = masked_units.Config(steps=30, batch=8, units=6, window=160, lr=5e-3)
    run = Run(quiet=True)
    masked_units.train(model, tones(24).without("word", "speaker"), config, run)
    losses = [line["ce"] for line in run.history]
    assert losses[-1] < losses[0] < 2 * math.log(6)
    del model.masked_spec_embed
    with pytest.raises(RoleError, match="masked frames"):
        masked_units.train(model, tones(24), config)
