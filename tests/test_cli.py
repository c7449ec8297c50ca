import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse import catalog, store
from stillhouse.cli import main

MODELS = '''
import torch
from torch import nn
def net(classes=4, pixels=64):
    torch.manual_seed(classes)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 8), nn.ReLU(), nn.Linear(8, classes))
def fewer(): return net(3)
def big(): return net(4, 256)
def number(): return 3
def language(vocabulary=64):
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                        num_attention_heads=1, num_key_value_heads=1))
def other_language(): return language(70)
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module of models and a file of pictures, as the current one."""
    (tmp_path / "mymodels.py").write_text(MODELS)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "pictures.npz", image=rng.normal(size=(40, 1, 8, 8)).astype("float32"))
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("mymodels", None)
    return tmp_path


def still(capsys, *words):
    """Exit status, output and error output of a command in this process."""
    status = 0
    try:
        main(words)
    except SystemExit as stop:
        status = stop.code or 0
    out, err = capsys.readouterr()
    return status, out, " ".join(err.split())


SSLD = ("run", "ssld", "--teacher", "mymodels:net", "--student", "mymodels:net", "--data", "pictures.npz",
        "--config.steps", "6", "--config.batch", "8", "--quiet")


# ------------------------------------------------------------------------------- list, show, help


def test_list_as_json_has_all_systems(capsys):
    status, out, _ = still(capsys, "list", "--json")
    entries = json.loads(out)
    assert status == 0 and len(entries) == 176
    assert set(entries[0]) >= {"number", "slug", "family", "title", "arxiv", "built", "verdict"}
    assert next(e for e in entries if e["slug"] == "ssld")["built"] is True


def test_list_can_be_narrowed(capsys):
    _, out, _ = still(capsys, "list", "--family", "datasets", "--built", "--json")
    assert {e["slug"] for e in json.loads(out)} >= {"mtt"} and all(e["built"] for e in json.loads(out))
    _, out, _ = still(capsys, "list", "--knowledge", "feature", "--scheme", "offline", "--json")
    found = json.loads(out)
    assert found and all("feature" in s["knowledge"] and s["scheme"] == "offline" for s in found)
    assert "no algorithm 'magic'" in still(capsys, "list", "--algorithm", "magic")[2]
    assert "relation and distribution knowledge, offline" in still(capsys, "show", "wcord")[1]
    status, _, err = still(capsys, "list", "--family", "cooking")
    assert status == 2 and "the families are compression" in err
    assert "built" in still(capsys, "list", "--family", "datasets")[1]


def test_show_says_what_a_system_is(capsys):
    status, out, _ = still(capsys, "show", "ssld")
    assert status == 0
    for part in ("--teacher", "Classifier", "per_class", "KL(p || m)", "Claims", "still run ssld", "EMBEDDED"):
        assert part in out
    assert "not built yet" in still(capsys, "show", "tinyclap")[1]


@pytest.mark.parametrize("command", [[], ["list"], ["show"], ["run"], ["verify"], ["report"], ["tour"],
                                     ["run", "ssld"]])
def test_every_command_has_help(capsys, command):
    status, out, _ = still(capsys, *command, "--help")
    assert status == 0 and "usage: still" in out and len(out) > 200


def test_without_words_it_shows_help(capsys):
    assert "subcommands" in still(capsys)[1]


def test_a_pipe_may_be_closed_early():
    command = f"{sys.executable} -m stillhouse show ssld | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("041 ssld") and done.stderr == ""


def test_version(capsys):
    assert still(capsys, "version")[1].strip() == "0.1.0"


# ------------------------------------------------------------------------------- bad input: one paragraph, no traceback


@pytest.mark.parametrize("words, status, says", [
    (["run", "sssld"], 2, "there is no system 'sssld'. Did you mean ssld"),
    (["show", "mt"], 2, "Did you mean"),
    (["run", "tinyclap"], 2, "planned but not built"),
    (["verify", "nothing-like-it"], 2, "there is no system"),
    (["verify"], 2, "name at least one system"),
    (["run", "ssld", "--config.steps", "5"], 2, "keeps its own config"),
    (["run", "ssld", "--preset", "huge"], 2, "there is paper, small"),
    (["run", "ssld", "--teacher", "mymodels:net"], 1, "roles are needed too: --student, --data"),
    ([*SSLD, "--teacher", "absent"], 2, "'absent' names no model"),
    ([*SSLD, "--teacher", "mymodels:absent"], 2, "absent"),
    ([*SSLD, "--teacher", "mymodels:number"], 1, "int"),
    ([*SSLD, "--teacher", "weights.safetensors"], 2, "no file"),
    ([*SSLD, "--teacher", "hf:./absent"], 2, "absent"),
    ([*SSLD, "--student", "mymodels:fewer"], 1, "teacher has 4, student has 3"),
    ([*SSLD, "--student", "mymodels:big"], 1, "student (Sequential) could not process one batch"),
    ([*SSLD, "--data", "absent"], 1, "absent"),
    ([*SSLD, "--data", "empty"], 1, "empty"),
    ([*SSLD, "--data", "broken"], 1, "bad.png"),
    ([*SSLD, "--data", "nan.npz"], 1, "NaN"),
    ([*SSLD, "--config.loss", "l7"], 2, "invalid choice"),
    ([*SSLD, "--config.last-stage", "7"], 2, "last_stage"),
    ([*SSLD, "--config.lr", "-1"], 2, "lr must be above 0"),
    ([*SSLD, "--device", "cuda:9"], 2, "not available"),
    ([*SSLD, "--resume", "absent"], 1, "no run in absent to resume"),
    ([*SSLD, "--out", "file/run"], 1, "cannot write"),
    (["report", "absent"], 1, "there is no folder absent"),
])
def test_bad_input_is_answered_in_one_paragraph(here, capsys, words, status, says):
    (here / "empty").mkdir()
    (here / "broken").mkdir()
    (here / "broken" / "bad.png").write_bytes(b"no picture")
    (here / "file").write_text("")
    np.savez(here / "nan.npz", image=np.full((4, 1, 8, 8), np.nan, dtype="float32"))
    found, out, err = still(capsys, *words)
    said = " ".join((err + " " + " ".join(out.split())).replace("│", " ").split())
    assert found == status, said
    assert says.lower() in said.lower() and "Traceback" not in said
    assert not list(here.rglob("*.safetensors"))


def test_vocabularies_that_differ_are_named(here, capsys):
    pytest.importorskip("transformers")
    status, _, err = still(capsys, "run", "distillm", "--teacher", "mymodels:language", "--student",
                           "mymodels:other_language", "--data", "grammar", "--validation", "grammar:validation")
    assert status == 1 and all(word in err for word in ("teacher", "64", "student", "70", "vocabulary")), err


def test_debug_shows_the_traceback(here, capsys):
    assert "Traceback" in still(capsys, "run", "sssld", "--debug")[2]


def test_an_unforeseen_error_is_one_line_too(here, capsys, monkeypatch):
    monkeypatch.setattr(catalog, "find", lambda slug: 1 / 0)
    status, _, err = still(capsys, "show", "ssld")
    assert status == 1 and "ZeroDivisionError" in err and "--debug" in err and "Traceback" not in err


# ------------------------------------------------------------------------------- run


def test_run_on_own_models_saves_the_student(here, capsys):
    status, out, err = still(capsys, *SSLD, "--out", "mine")
    assert status == 0, err
    assert "mine/target" in out
    weights = store.load_tree(here / "mine" / "target" / "model.safetensors")
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    student.load_state_dict(weights)
    status, out, err = still(capsys, "report", "mine")
    assert status == 0 and (here / "mine" / "report.html").is_file()
    status, _, err = still(capsys, *SSLD, "--out", "mine")
    assert status == 1 and "already holds a run" in err
    status, out, err = still(capsys, "run", "ssld", "--resume", "mine")
    assert status == 0, err
    status, _, err = still(capsys, "run", "ssld", "--resume", "mine", "--config.lr", "0.7")
    assert status == 1 and "config.lr was" in err
    status, _, err = still(capsys, "run", "ssld", "--resume", "mine", "--teacher", "mymodels:fewer")
    assert status == 1 and "fingerprint.teacher" in err


def test_default_folders_are_numbered(here, capsys):
    for number in (1, 2):
        assert still(capsys, *SSLD)[0] == 0
        assert (here / "runs" / f"ssld-{number}" / "target").is_dir()


def test_dry_run_says_what_it_would_cost_and_writes_nothing(here, capsys):
    before = sorted(here.rglob("*"))
    status, out, _ = still(capsys, *SSLD, "--dry-run")
    assert status == 0 and "dry run: checked" in out
    assert [p for p in sorted(here.rglob("*")) if "__pycache__" not in str(p)] == before


def test_ctrl_c_saves_and_says_how_to_go_on(here):
    words = [w if w != "6" else "4000" for w in SSLD]
    environment = {**os.environ, "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stillhouse", *words, "--out", "mine", "--checkpoint-seconds", "0.2"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    for _ in range(600):
        if list((here / "mine").rglob("step-*.safetensors")) or child.poll() is not None:
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "continue with: still run ssld --resume mine" in err and "Traceback" not in err
    assert list((here / "mine").rglob("step-*.safetensors"))


def test_a_missing_extra_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(catalog.EXTRAS, "hf", ("no_such_package",))
    status, _, err = still(capsys, "run", "distillm")
    assert status == 1 and "pip install 'stillhouse[hf]'" in err



def test_two_processes_through_torchrun_share_one_folder(here):
    (here / "mymodels.py").write_text(MODELS + """
def other():
    torch.manual_seed(99)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
""")
    words = ["run", "ssld", "--teacher", "mymodels:net", "--student", "mymodels:other", "--data", "pictures.npz",
             "--config.steps", "6", "--config.batch", "8", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"}

    def launch(*more):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                   "-m", "stillhouse", *words, *more]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    done = launch("--out", "two")
    assert done.returncode == 0, done.stderr[-2000:]
    main([*words, "--out", "one"])
    one, two = (store.load_tree(here / name / "target" / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)
    assert "give --out" in launch().stderr


def test_taps_lists_paths_and_shapes(capsys):
    main(["taps", "tiny-convnet", "--role", "classifier", "--shape", "1", "16", "16"])
    printed = capsys.readouterr().out
    assert "1 x 10" in printed and "Linear" in printed and "(the model)" in printed


def test_taps_of_an_example_that_does_not_fit_says_so(capsys):
    with pytest.raises(SystemExit):
        main(["taps", "tiny-convnet", "--shape", "5", "16", "16"])
    assert "could not process one example of shape (5, 16, 16)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("role, shape, says", [
    ("text-classifier", ["9"], "1 x 3"), ("text-encoder", ["9"], "1 x 8"), ("seq2seq", ["9"], "1 x 4 x 40"),
    ("speech-encoder", ["400"], "1 x 12 x 8"), ("dual-encoder", ["3", "8", "8"], "1 x 6"),
])
def test_taps_of_text_sound_and_dual_encoders(here, capsys, role, shape, says):
    transformers = pytest.importorskip("transformers")
    from stillhouse.models.dual_encoders import clip, word_tokenizer

    tokenizer = word_tokenizer(["red circle"], length=12)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    bert = transformers.BertConfig(vocab_size=len(tokenizer), num_labels=3, **small)
    made = {
        "text-classifier": lambda: transformers.BertForSequenceClassification(bert),
        "text-encoder": lambda: transformers.BertModel(bert),
        "seq2seq": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)),
        "speech-encoder": lambda: transformers.HubertModel(transformers.HubertConfig(
            conv_dim=[4, 4], conv_kernel=[8, 4], conv_stride=[8, 4], num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, **small)),
        "dual-encoder": lambda: clip(tokenizer, features=6, width=8, layers=1, heads=2, patch=4, image=8,
                                     text_layers=1, length=12, text_width=8),
    }
    made[role]().save_pretrained(here / "model")
    tokenizer.save_pretrained(here / "model")
    status, out, err = still(capsys, "taps", "hf:model", "--role", role, "--shape", *shape)
    assert status == 0, err
    assert says in out and "(the model)" in out


def test_a_finished_run_says_what_comes_next(here, capsys):
    out = still(capsys, *SSLD, "--out", "mine")[1]
    for command in ("still predict mine --data DATA --arch mymodels:net", "still eval mine --data LABELLED --arch",
                    "still export mine --to onnx --arch mymodels:net", "still report mine"):
        assert command in out


def test_a_run_with_scores_goes_on_where_it_was(here, capsys, monkeypatch):
    """The student is looked at ten times in all, whether or not the run was stopped in between."""
    from stillhouse.run import Run

    images = np.load(here / "pictures.npz")["image"]
    np.savez(here / "held.npz", image=images, label=np.arange(40) % 4)
    words = [*(w if w != "6" else "20" for w in SSLD), "--eval", "held.npz", "--out", "mine"]
    loop = Run.loop

    def stopping(self, *args, **kwargs):
        for batch in loop(self, *args, **kwargs):
            if self.k == 7:
                self.stop()
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Run, "loop", stopping)
        status, _, err = still(capsys, *words)
    assert status == 130 and "--resume mine" in err
    status, out, err = still(capsys, "run", "ssld", "--resume", "mine")
    assert status == 0 and "accuracy" in out, err
    logged = [json.loads(line) for log in (here / "mine").rglob("log.jsonl") for line in log.read_text().splitlines()]
    assert len([line for line in logged if "eval_accuracy" in line]) >= 10
    assert len({(line["stage"], line["k"]) for line in logged if "eval_accuracy" in line}) == len(
        [line for line in logged if "eval_accuracy" in line])
