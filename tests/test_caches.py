"""Outputs of teachers kept on disk, and used in their place."""

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from stillhouse.cli import main
from stillhouse.data.fixed_views import with_views
from stillhouse.data.kept import Kept, Table, keys_of, token_keys
from stillhouse.data.readers import read_data
from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DamagedFileError, DataError, RoleError, StoreError, UnknownNameError
from stillhouse.hub.models import resolve_model
from stillhouse.measures.divergences import kl
from stillhouse.measures.projected import projected_topk_kl
from stillhouse.models.language import gpt2
from stillhouse.protocols import CausalLM, Classifier, Encoder, SpeechEncoder, TextClassifier, TokenPairs, TopKTeacher
from stillhouse.recipes import kd
from stillhouse.run.caches import Pairs, cache_outputs, cache_pairs
from stillhouse.systems.compression import quantized_distillation, ssld


def pictures(n=24, side=8):
    g = torch.Generator().manual_seed(1)
    return TensorSet(image=torch.randn(n, 1, side, side, generator=g), label=torch.arange(n) % 4)


def network(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 4))


def texts(n=6, length=9, vocabulary=17):
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(4, vocabulary, (n, length), generator=g)
    mask = (torch.arange(length) < torch.randint(3, length + 1, (n, 1), generator=g)).long()
    return TensorSet(input_ids=ids * mask, attention_mask=mask, target_mask=mask)


def language_model(vocabulary=17):
    torch.manual_seed(3)
    return gpt2(vocabulary).eval()


def test_keys_are_those_of_the_content():
    x = torch.randn(50, 3, 5)
    keys = keys_of(x)
    assert keys.dtype == torch.int64 and len(keys.unique(dim=0)) == 50
    assert torch.equal(keys[7:9], keys_of(x[7:9]))
    assert torch.equal(keys_of(torch.zeros(1, 4)), keys_of(-torch.zeros(1, 4)))
    assert not torch.equal(keys_of(torch.zeros(1, 4)), keys_of(torch.zeros(1, 2, 2)))
    changed = x.clone()
    changed[0, 0, 0] = torch.nextafter(changed[0, 0, 0], torch.tensor(9.0))
    assert (keys_of(changed) != keys).all(1).tolist() == [True] + [False] * 49
    signs = torch.randint(0, 2, (4000, 40), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    assert len(keys_of(signs).unique(dim=0)) == len(signs.unique(dim=0))


def test_keys_equal_those_computed_by_hand():
    words = torch.tensor([[1.5, -0.0, -2.0]]).add(0.0).view(torch.int32)[0].tolist()
    from stillhouse.data.kept import MIX, _weights, hash_of_shape

    def signed(v):
        return (v + (1 << 63)) % (1 << 64) - (1 << 63)

    sums = [0, 0]
    for w, *weights in zip(words, *(r.tolist() for r in _weights(3, "cpu")), strict=True):
        x = signed(w * MIX)
        x ^= x >> 29
        sums = [signed(s + x * r) for s, r in zip(sums, weights, strict=True)]
    assert keys_of(torch.tensor([[1.5, -0.0, -2.0]])).tolist() == [[signed(s + hash_of_shape((3,))) for s in sums]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_keys_are_the_same_on_a_gpu():
    x = torch.randn(40, 3, 32, 32)
    assert torch.equal(keys_of(x), keys_of(x.cuda()).cpu())


def test_keys_of_tokens_do_not_see_padding():
    right = torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    left = torch.tensor([[9, 5, 6, 7]]), torch.tensor([[0, 1, 1, 1]])
    plain = torch.tensor([[5, 6, 7]])
    assert torch.equal(token_keys(*right), token_keys(*left))
    assert torch.equal(token_keys(*right), token_keys(plain))
    for other in ([5, 7, 6], [5, 6], [5, 6, 7, 0]):
        assert not torch.equal(token_keys(plain), token_keys(torch.tensor([other])))


def test_a_table_says_what_is_not_there():
    keys = keys_of(torch.randn(30, 4))
    place, found = Table(keys).find(torch.cat([keys[[4, 2]], keys[:1] + 1]))
    assert place[:2].tolist() == [4, 2] and found.tolist() == [True, True, False]


@pytest.mark.parametrize("system", ["kd", "quantized"])
def test_the_student_is_the_same_bit_for_bit(tmp_path, system):
    teacher, data = network(), pictures()
    cache_outputs(teacher, data, tmp_path / "kept", batch=8)
    students = []
    for given in (teacher, resolve_model(f"cache:{tmp_path / 'kept'}", Classifier)):
        student = network(5, 4)
        if system == "kd":
            kd.distill(given, student, data, kd.Config(steps=9, batch=8))
        else:
            config = quantized_distillation.Config(steps=6, batch=8)
            student = quantized_distillation.distill(student, data, given, config).model
        students.append(student.state_dict())
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())


def test_a_system_that_augments_at_random_is_refused(tmp_path):
    data = pictures()
    cache_outputs(network(), data, tmp_path / "kept")
    cached = resolve_model(f"cache:{tmp_path / 'kept'}", Classifier)
    plain = ssld.Config(steps=2, batch=8, view=0.0, per_class=None)
    ssld.distill(cached, network(1), data.without("label"), config=plain)
    with pytest.raises(RoleError, match=r"not in the cache .* 24 samples, as they are.*--views K"):
        ssld.distill(cached, network(1), data.without("label"), config=ssld.Config(steps=2, batch=8, view=1.0,
                                                                                   per_class=None))


def test_fixed_views_are_found_again(tmp_path):
    teacher, data = network(), pictures(10)
    cache_outputs(teacher, data, tmp_path / "kept", views=3, flip=True)
    cached = resolve_model(f"cache:{tmp_path / 'kept'}", Classifier)
    views = with_views(data, 3, flip=True)
    assert len(views) == 30 and views[4]["label"] == data[1]["label"] and int(views[4]["index"]) == 4
    batch = views.batch([29, 0, 14])
    torch.testing.assert_close(cached(batch["image"]), teacher(batch["image"]))
    assert torch.equal(views[0]["image"], data[0]["image"])
    assert len({tuple(v["image"].flatten().tolist()) for v in views}) > 20
    assert torch.equal(views[14]["image"], with_views(data, 3, flip=True).batch([14])["image"][0])
    student = network(2)
    kd.distill(cached, student, views, kd.Config(steps=4, batch=8))
    with pytest.raises(RoleError, match="in 3 fixed views each"):
        cached(with_views(data, 3, flip=True, seed=1).batch(range(30))["image"])
    with pytest.raises(DataError, match="no field 'image'"):
        with_views(texts(), 2)


def test_features_and_texts(tmp_path):
    data, encoder = pictures(), network(3)
    cache_outputs(encoder, data, tmp_path / "features", "encoder", dtype="float16")
    cached = resolve_model(f"cache:{tmp_path / 'features'}", Encoder)
    error = Kept(tmp_path / "features").manifest["error"]
    assert 0 < error < 1e-3
    torch.testing.assert_close(cached(data.image), encoder(data.image), rtol=0, atol=error)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(17, 3)

        def forward(self, input_ids, attention_mask=None):
            return (self.table(input_ids) * attention_mask[..., None]).sum(1)

    read, reader = texts(), Reader()
    cache_outputs(reader, read, tmp_path / "texts", "text-classifier")
    cached = resolve_model(f"cache:{tmp_path / 'texts'}", TextClassifier)
    wide = nn.functional.pad(read.input_ids, (0, 4)), nn.functional.pad(read.attention_mask, (0, 4))
    torch.testing.assert_close(cached(*wide), reader(read.input_ids, read.attention_mask))


def test_speech(tmp_path):
    pytest.importorskip("transformers")
    from stillhouse.zoo.speech import hubert

    data = TensorSet(audio=torch.randn(5, 400))
    teacher = hubert(16, 2, 2, 12, (6, 8, 8)).eval()
    cache_outputs(teacher, data, tmp_path / "kept", "speech-encoder", layers=(0, 2))
    cached = resolve_model(f"cache:{tmp_path / 'kept'}", SpeechEncoder)
    made, want = cached(data.audio[2:4]), teacher(data.audio, output_hidden_states=True)
    torch.testing.assert_close(made.last_hidden_state, want.last_hidden_state[2:4])
    torch.testing.assert_close(made.hidden_states[2], want.hidden_states[2][2:4])
    assert made.hidden_states[1] is None
    with pytest.raises(RoleError, match="no layers"):
        cache_outputs(teacher, data, tmp_path / "more", "speech-encoder", layers=(7,))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float16", 4e-3), ("uint8", 0.05)])
def test_top_k(tmp_path, dtype, bound):
    pytest.importorskip("transformers")
    teacher, data = language_model(), texts()
    cache_outputs(teacher, data, tmp_path / "kept", "causal-lm", top_k=5, dtype=dtype, batch=4)
    cached = resolve_model(f"cache:{tmp_path / 'kept'}", TopKTeacher)
    error = Kept(tmp_path / "kept").manifest["error"]
    assert cached.vocabulary == 17 and error <= bound
    mask = data.attention_mask
    wide = nn.functional.pad(data.input_ids, (0, 3)), nn.functional.pad(mask, (0, 3))
    log_p, index = cached.top_k(*wide)
    want = teacher(input_ids=data.input_ids, attention_mask=mask).logits.log_softmax(-1)
    real = mask.bool()
    torch.testing.assert_close(log_p[:, :-3][real], want.topk(5).values[real], rtol=0, atol=error + 1e-5)
    torch.testing.assert_close(want.gather(-1, index[:, :-3])[real], log_p[:, :-3][real], rtol=0, atol=error + 1e-5)
    assert (log_p[:, -3:] == -torch.inf).all() and (index[:, -3:] == 0).all()
    left = torch.stack([torch.roll(row, int((m == 0).sum())) for row, m in zip(data.input_ids, mask, strict=True)])
    turned = torch.stack([torch.roll(m, int((m == 0).sum())) for m in mask])
    assert torch.equal(cached.top_k(left, turned)[0][turned.bool()], log_p[:, :-3][real])
    with pytest.raises(RoleError, match="not in the cache"):
        cached.top_k(data.input_ids + 1, mask)


def test_all_tokens_kept_give_the_loss_of_the_teacher_itself(tmp_path):
    pytest.importorskip("transformers")
    teacher, data = language_model(), texts()
    cache_outputs(teacher, data, tmp_path / "kept", "causal-lm", top_k=99)
    log_p, index = resolve_model(f"cache:{tmp_path / 'kept'}", TopKTeacher).top_k(data.input_ids, data.attention_mask)
    assert log_p.shape[-1] == 17
    real = data.attention_mask.bool()
    hidden, weight = torch.randn(int(real.sum()), 8), torch.randn(17, 8)
    whole = kl(teacher(input_ids=data.input_ids, attention_mask=data.attention_mask).logits[real], hidden @ weight.T)
    torch.testing.assert_close(projected_topk_kl(log_p[real], index[real], hidden, weight), whole, rtol=1e-4, atol=1e-5)


def test_a_temperature_that_is_not_asked_for_is_refused(tmp_path):
    pytest.importorskip("transformers")
    teacher, data = language_model(), texts()
    cache_outputs(teacher, data, tmp_path / "kept", "causal-lm", top_k=4, temperature=2.0)
    with pytest.raises(RoleError, match=r"at temperature 2, and 1 is asked for.*:temperature=2"):
        resolve_model(f"cache:{tmp_path / 'kept'}", TopKTeacher)
    cached = resolve_model(f"cache:{tmp_path / 'kept'}:temperature=2", CausalLM)
    want = (teacher(input_ids=data.input_ids, attention_mask=data.attention_mask).logits / 2).log_softmax(-1)
    log_p, _ = cached.top_k(data.input_ids, data.attention_mask)
    torch.testing.assert_close(log_p[0, 0], want[0, 0].topk(4).values)
    with pytest.raises(RoleError, match="TopKTeacher"):
        cached(input_ids=data.input_ids)
    with pytest.raises(UnknownNameError, match="no option 'heat'"):
        resolve_model(f"cache:{tmp_path / 'kept'}:heat=2", TopKTeacher)


KILLED = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from test_caches import network, pictures
from stillhouse.run.caches import cache_outputs
print("begun", flush=True)
def slow(done, rows):
    print(done, flush=True)
    time.sleep(0.05)
cache_outputs(network(), pictures(400), {folder!r}, batch=4, block=4, progress=slow)
"""


def test_a_killed_process_loses_a_block_at_most(tmp_path):
    folder = tmp_path / "kept"
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    seen = 0
    while seen < 20:
        line = child.stdout.readline()
        assert line, "the child ended early"
        seen = int(line) if line.strip().isdigit() else 0
    child.send_signal(signal.SIGKILL)
    last = [int(w) for w in child.stdout.read().split() if w.isdigit()]
    child.wait()
    done = json.loads((folder / "kept.json").read_text())["done"]
    assert max([seen, *last]) <= done < 400
    with pytest.raises(DataError, match=rf"not finished: {done} of 400 rows.*goes on"):
        resolve_model(f"cache:{folder}", Classifier)
    calls = []
    teacher, data = network(), pictures(400)
    hook = teacher.register_forward_hook(lambda _, x, y: calls.append(len(y)))
    (folder / ".rows-000099.1.tmp").write_bytes(b"half")
    cache_outputs(teacher, data, folder, batch=4, block=4)
    hook.remove()
    assert sum(calls) <= 400 - done + 8
    torch.testing.assert_close(resolve_model(f"cache:{folder}", Classifier)(data.image), teacher(data.image))


@pytest.mark.parametrize(("change", "name"), [
    ({"teacher": network(9)}, "teacher"), ({"data": pictures(23)}, "data"), ({"views": 2}, "views"),
    ({"dtype": "float16"}, "dtype"), ({"role": "encoder"}, "role")])
def test_another_teacher_data_or_setting_is_refused_by_name(tmp_path, change, name):
    given = {"teacher": network(), "data": pictures(), "folder": tmp_path / "kept"}
    cache_outputs(**given)
    before = sorted(p.name for p in (tmp_path / "kept").iterdir())
    with pytest.raises(StoreError, match=f"made with another {name}"):
        cache_outputs(**{**given, **change})
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == before


@pytest.mark.parametrize("harm", ["altered", "cut", "missing", "manifest"])
def test_a_damaged_cache_is_refused(tmp_path, harm):
    cache_outputs(network(), pictures(), tmp_path / "kept", block=8, batch=8)
    path = sorted((tmp_path / "kept").glob("rows-*"))[1]
    content = bytearray(path.read_bytes())
    if harm == "altered":
        content[-3] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[:-9])
    elif harm == "missing":
        path.unlink()
    else:
        (tmp_path / "kept" / "kept.json").write_text("{")
    with pytest.raises(DamagedFileError):
        resolve_model(f"cache:{tmp_path / 'kept'}", Classifier)


def test_a_manifest_that_points_elsewhere_is_refused(tmp_path):
    cache_outputs(network(), pictures(), tmp_path / "kept")
    manifest = json.loads((tmp_path / "kept" / "kept.json").read_text())
    manifest["blocks"][0]["file"] = "../outside.safetensors"
    (tmp_path / "kept" / "kept.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="outside"):
        resolve_model(f"cache:{tmp_path / 'kept'}", Classifier)


def test_bad_input(tmp_path):
    teacher, data = network(), pictures()
    with pytest.raises(DataError, match="no cache in .*still cache TEACHER"):
        resolve_model(f"cache:{tmp_path / 'none'}", Classifier)
    with pytest.raises(DataError, match="empty"):
        cache_outputs(teacher, TensorSet(image=torch.zeros(0, 1, 8, 8)), tmp_path / "a")
    with pytest.raises(DataError, match="no field 'image'"):
        cache_outputs(teacher, TensorSet(x=torch.zeros(3, 2)), tmp_path / "a")
    with pytest.raises(ConfigError, match="uint8 is for log-probabilities"):
        cache_outputs(teacher, data, tmp_path / "a", dtype="uint8")
    with pytest.raises(ConfigError, match="at least 1"):
        cache_outputs(teacher, data, tmp_path / "a", views=0)
    with pytest.raises(ConfigError, match="temperature is for"):
        cache_outputs(teacher, data, tmp_path / "a", temperature=2.0)
    broken = copy.deepcopy(teacher)
    with torch.no_grad():
        broken[-1].bias[0] = torch.nan
    with pytest.raises(RoleError, match="not finite"):
        cache_outputs(broken, data, tmp_path / "a")
    loud = nn.Sequential(teacher, nn.Hardtanh(9e4, 1e5))
    with pytest.raises(DataError, match="65504"):
        cache_outputs(loud, data, tmp_path / "a", dtype="float16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(StoreError, match="other files"):
        cache_outputs(teacher, data, tmp_path / "full")
    cache_outputs(teacher, data, tmp_path / "kept")
    with pytest.raises(RoleError, match=r"of a classifier, and this role needs a TopKTeacher.*--role causal-lm"):
        resolve_model(f"cache:{tmp_path / 'kept'}", TopKTeacher)
    with pytest.raises(UnknownNameError, match="no temperature"):
        resolve_model(f"cache:{tmp_path / 'kept'}:temperature=1", Classifier)


def test_pairs_of_a_denoiser(tmp_path):
    from stillhouse.diffusion.grids import uniform
    from stillhouse.diffusion.process import VE
    from stillhouse.diffusion.samplers import ode_endpoint
    from stillhouse.zoo.denoisers import gauss2d_teacher

    teacher, data = gauss2d_teacher(VE(0.05, 5.0, rho=0)), TensorSet(x=torch.randn(6, 2))
    cache_pairs(teacher, data, tmp_path / "pairs", 20, ode_steps=4, batch=8)
    pairs = Pairs(tmp_path / "pairs")
    assert len(pairs) == 20 and set(pairs.fields) == {"z", "x"}
    torch.testing.assert_close(pairs[11]["x"], ode_endpoint(teacher, pairs[11]["z"][None], uniform(4))[0])
    with pytest.raises(StoreError, match="another ode_steps"):
        cache_pairs(teacher, data, tmp_path / "pairs", 20, ode_steps=5)
    with pytest.raises(RoleError, match="data, not a teacher"):
        resolve_model(f"cache:{tmp_path / 'pairs'}", Classifier)


def test_a_look_up_costs_less_than_a_small_teacher(tmp_path):
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    data = TensorSet(image=torch.randn(256, 3, 32, 32))
    cache_outputs(teacher, data, tmp_path / "kept", batch=64)
    cached = resolve_model(f"cache:{tmp_path / 'kept'}", Classifier)

    def seconds(model):
        best = 1e9
        with torch.no_grad():
            for _ in range(5):
                start = time.perf_counter()
                model(data.image[:64])
                best = min(best, time.perf_counter() - start)
        return best

    assert seconds(cached) < seconds(teacher)


def test_the_command_and_a_run_with_what_it_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    main(["cache", "tiny-convnet", "--data", "digits16:labelled", "--out", "kept", "--dtype", "float16"])
    assert "use it as: --teacher cache:kept" in capsys.readouterr().out
    main(["run", "quantized-distillation", "--teacher", "cache:kept", "--student", "tiny-convnet", "--labelled",
          "digits16:labelled", "--config.steps", "2", "--config.batch", "8", "--out", "done", "--quiet"])
    main(["cache", "tiny-convnet", "--data", "digits16:labelled", "--out", "kept", "--dtype", "float16"])
    for words, said in ((["--dtype", "float32"], "another dtype"), (["--role", "causal-lm"], "no `generate`"),
                        (["--dtype", "float16", "--data", "digits16:test"], "another data")):
        with pytest.raises(SystemExit):
            main(["cache", "tiny-convnet", "--data", "digits16:labelled", "--out", "kept", *words])
        assert said in " ".join(capsys.readouterr().err.split())


def test_distillm_from_a_cache(tmp_path):
    pytest.importorskip("transformers")
    from stillhouse.systems.language import distillm
    from stillhouse.zoo.language import grammar_model

    torch.manual_seed(0)
    data, validation, teacher = (*(read_data(f"grammar:{s},n=16", TokenPairs) for s in ("train", "validation")),
                                 grammar_model(16, 1, 2).eval())
    cache_outputs(teacher, data, tmp_path / "kept", "causal-lm", top_k=10000)
    start = grammar_model(8, 1, 2)
    config = distillm.Config(steps=4, batch=4, phi=0.0, eps=1e9, max_new_tokens=4, fine_tuning=0.0, select="last",
                             lr=1e-3)
    students = [distillm.distill(t, copy.deepcopy(start), data, validation, config=config).state_dict()
                for t in (teacher, resolve_model(f"cache:{tmp_path / 'kept'}", TopKTeacher))]
    for name, value in students[0].items():
        torch.testing.assert_close(students[1][name], value, rtol=1e-3, atol=1e-5)
    with pytest.raises(RoleError, match="not in the cache .*texts that the student wrote"):
        distillm.distill(resolve_model(f"cache:{tmp_path / 'kept'}", TopKTeacher), copy.deepcopy(start), data,
                         validation, config=distillm.Config(**{**vars(config), "phi": 1.0}))
