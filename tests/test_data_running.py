"""A user's own data through `still run`, each system for a step or two."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.cli import main

datasets = pytest.importorskip("datasets")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def still(capsys, *words):
    status = 0
    try:
        main(words)
    except SystemExit as stop:
        status = stop.code or 0
    out, err = capsys.readouterr()
    return status, out, " ".join(err.split())


def pictures(n, size=8):
    rng = np.random.default_rng(0)
    held = []
    for _ in range(n):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (size, size), dtype=np.uint8)).save(file, "PNG")
        held.append({"bytes": file.getvalue(), "path": None})
    return datasets.Dataset.from_dict({"img": held, "kind": [i % 2 for i in range(n)]}).cast_column(
        "img", datasets.Image())


SSLD = ("run", "ssld", "--teacher", "convnet:width=4,depth=1,image_size=8", "--student",
        "convnet:width=4,depth=1,image_size=8", "--config.steps", "2", "--config.batch", "4", "--config.per-class",
        "None", "--quiet", "--out", "out")


def test_ssld_on_a_parquet_file(here, capsys):
    table = pictures(12).to_list()
    table[5]["img"] = {"bytes": b"no picture", "path": None}
    datasets.Dataset.from_list(table).to_parquet("a.parquet")
    status, out, err = still(capsys, *SSLD, "--data", "a.parquet", "--columns", "image=img", "--limit-broken", "0.1")
    assert status == 0, err
    assert "1 of 12 rows of a.parquet cannot be read" in out and out.count("left out") == 1
    assert (here / "out" / "target" / "target.json").is_file()
    status, _, err = still(capsys, *SSLD, "--data", "a.parquet", "--columns", "image=picture", "--dry-run")
    assert status == 1 and "no column 'picture' in a.parquet; there are img, kind" in err
    status, _, err = still(capsys, *SSLD, "--data", "a.parquet", "--columns", "image", "--dry-run")
    assert status == 2 and "field=column" in err
    status, _, err = still(capsys, *SSLD, "--data", "digits:test", "--columns", "image=img", "--dry-run")
    assert status == 2 and "--columns goes with a table" in err


def test_scan_and_fedx_on_saved_data_sets(here, capsys):
    whole = datasets.DatasetDict({"train": pictures(24), "test": pictures(12)})
    whole.save_to_disk("saved")
    status, _, err = still(
        capsys, "run", "scan", "--student", "conv-encoder:width=4,depth=1,image_size=8", "--data", "hf:saved",
        "--columns", "image=img,label=kind", "--config.pretext-steps", "1", "--config.pretext-batch", "8",
        "--config.scan-epochs", "1", "--config.most-epochs", "1", "--config.label-epochs", "1", "--config.guard", "0",
        "--config.clusters", "3", "--config.neighbours", "3", "--quiet", "--out", "scan")
    assert status == 0, err
    status, _, err = still(
        capsys, "run", "fedx", "--network", "conv-encoder:width=4,depth=1,image_size=8", "--clients",
        "hf:saved:split=train,hf:saved:split=test", "--columns", "image=img", "--config.rounds", "1",
        "--config.epochs", "1", "--config.hidden", "6", "--config.out", "5", "--config.batch", "8", "--quiet",
        "--out", "fedx")
    assert status == 0, err


def test_distillm_on_a_csv_file(here, capsys):
    transformers = pytest.importorskip("transformers")
    from stillhouse.models.dual_encoders import word_tokenizer

    tokenizer = word_tokenizer(["red circle", "green square", "blue ring"], length=12)
    tokenizer.save_pretrained("words")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=40, n_embd=8, n_layer=1, n_head=2, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained("gpt2")
    (here / "qa.csv").write_text("question,answer,source\n" + "red circle,green square,x\n" * 4)
    words = ("run", "distillm", "--teacher", "hf:gpt2", "--student", "hf:gpt2", "--data", "qa.csv", "--validation",
             "qa.csv", "--columns", "prompt=question,response=answer", "--tokenizer", "words", "--length", "16",
             "--config.steps",
             "2", "--config.batch", "2", "--config.max-new-tokens", "3", "--quiet")
    status, _, err = still(capsys, *words, "--out", "out")
    assert status == 0, err
    status, _, err = still(capsys, *words[:-5], "--length", "1", "--dry-run")
    assert status == 2 and "length must be at least 2" in err


def test_dphubert_on_a_folder_of_flac_files(here, capsys):
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("transformers")
    from stillhouse.zoo.speech import hubert

    torch.manual_seed(0)
    hubert(16, 2, 2, 12, (6, 8, 8)).save_pretrained("hubert")
    (here / "sounds" / "me").mkdir(parents=True)
    for i in range(5):
        values = np.random.default_rng(i).normal(size=200).astype("float32") * 0.1
        soundfile.write(here / "sounds" / "me" / f"{i}.flac", values, 8000)
    status, _, err = still(
        capsys, "run", "dphubert", "--teacher", "hf:hubert", "--student", "hf:hubert", "--data", "sounds",
        "--size", "400", "--config.steps", "3", "--config.batch", "2", "--config.layers", "0", "1", "--quiet",
        "--out", "out")
    assert status == 0, err


def test_mirage_on_graphs_of_torch_geometric(here, capsys):
    pytest.importorskip("torch_geometric")
    pytest.importorskip("mlxtend")
    from stillhouse.data.graph_files import graphs_of
    from stillhouse.data.graphs import motifs

    graphs_of([motifs(n=40).graph(i) for i in range(40)], "graphs")
    status, _, err = still(capsys, "run", "mirage", "--labelled", "graphs", "--quiet", "--out", "out")
    assert status == 0, err
    assert json.loads((here / "out" / "target" / "target.json").read_text())["system"] == "mirage"
