"""Predictions and scores of results, and scores while a run goes on."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import stillhouse
from stillhouse import store
from stillhouse.cli import main
from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.deploy.predict import predict, read_prompts
from stillhouse.deploy.scores import labels_of, score, watcher
from stillhouse.deploy.targets import About, about_run, read_about, save
from stillhouse.errors import ConfigError, DamagedFileError, DataError, Interrupted, StoreError
from stillhouse.evaluate.classification import accuracy
from stillhouse.models.convnets import ConvEncoder, TinyConvNet
from stillhouse.run import Run
from stillhouse.systems.compression import ssld

ENCODER = "conv-encoder:width=4,depth=1,image_size=8"
FLOW = "flow_of_predict:flow"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def still(capsys, *words):
    """Exit status, output and error output of a command in this process."""
    status = 0
    try:
        main([str(w) for w in words])
    except SystemExit as stop:
        status = stop.code or 0
    out, err = capsys.readouterr()
    return status, out, " ".join(err.split())


def table(path):
    return list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines()))


def saved(target, about, folder="done"):
    """A result in the folder of a run."""
    save(target, f"{folder}/target", about)
    return folder


def classifier(folder="done", **about):
    torch.manual_seed(0)
    model = TinyConvNet(classes=10).eval()
    saved(model, About("ssld", kind="Classifier", network={"text": "tiny-convnet"}, example={"image": [1, 16, 16]},
                       **about), folder)
    return model


def pictures(folder, classes=("a", "b"), size=20, n=3, mode="L"):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            shape = (size, size) if mode == "L" else (size, size, 3)
            Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / name / f"{i}.png")


# ---------------------------------------------------------------------------------- predictions


def test_a_classifier_names_the_three_likeliest_classes(here, capsys):
    model = classifier()
    status, out, err = still(capsys, "predict", "done", "--data", "digits16:test", "--batch", 100, "--quiet")
    assert status == 0 and "done/predictions.csv" in out, err
    rows = table("done/predictions.csv")
    data = digits(16, "test")
    with torch.no_grad():
        p = model(data.image).softmax(-1)
    values, labels = p.topk(3)
    assert len(rows) == len(data) and [int(r["label"]) for r in rows] == labels[:, 0].tolist()
    assert [int(r["label_3"]) for r in rows] == labels[:, 2].tolist()
    np.testing.assert_allclose([float(r["probability_2"]) for r in rows], values[:, 1], rtol=1e-4)
    assert [r["index"] for r in rows[:2]] == ["0", "1"]


def test_pictures_of_a_folder_are_brought_to_the_size_trained_on(here, capsys):
    classifier(classes=[f"c{i}" for i in range(10)])
    pictures(here / "own")
    status, _, err = still(capsys, "predict", "done", "--data", "own", "--out", "said.csv", "--quiet")
    assert status == 0, err
    rows = table("said.csv")
    assert [r["item"] for r in rows] == [f"own/{c}/{i}.png" for c in "ab" for i in range(3)]
    assert all(r["name"] == f"c{r['label']}" for r in rows)


def test_features_of_an_encoder(here, capsys):
    torch.manual_seed(0)
    encoder = ConvEncoder(width=4, depth=1).eval()
    saved(encoder, About("wcord", kind="Encoder", network={"text": ENCODER}, example={"image": [1, 8, 8]}))
    status, _, err = still(capsys, "predict", "done", "--data", "digits:test", "--quiet")
    assert status == 0, err
    with torch.no_grad():
        expected = encoder(digits(8, "test").image)
    torch.testing.assert_close(load_file("done/features.safetensors")["features"], expected)


def test_clusters_and_the_scores_of_clusters(here, capsys):
    words = ["--student", ENCODER, "--data", "digits:labelled", "--config.pretext-steps", 1, "--config.pretext-batch",
             16, "--config.scan-epochs", 1, "--config.most-epochs", 1, "--config.label-epochs", 0, "--config.guard", 0,
             "--config.clusters", 4, "--quiet"]
    status, out, err = still(capsys, "run", "scan", *words, "--out", "done", "--eval", "digits:test")
    assert status == 0, err
    assert "clustering_accuracy" in out and "nmi" in out
    assert set(read_about("done").metrics) == {"clustering_accuracy", "nmi", "ari"}
    assert json.loads((here / "done" / "eval.json").read_text())["data"] == "digits:test"
    assert still(capsys, "predict", "done", "--data", "digits:test", "--quiet")[0] == 0
    found = [int(r["cluster"]) for r in table("done/clusters.csv")]
    assert found == stillhouse.load("done").predict(digits(8, "test").image).tolist()


def test_a_density_draws_and_says_what_samples_are_worth(here, capsys):
    (here / "flow_of_predict.py").write_text(
        "from stillhouse.models.flows import picture_flow\n\ndef flow():\n"
        "    return picture_flow((1, 8, 8), 17, scales=1, hidden=4, blocks=1)\n")
    status, out, err = still(capsys, "run", "real-nvp", "--student", FLOW, "--data", "digits:labelled",
                             "--config.steps", 2, "--config.batch", 8, "--quiet", "--out", "done", "--eval",
                             "digits:test")
    assert status == 0 and "bits_per_dimension" in out, err
    assert f"still predict done --arch {FLOW}" in out
    drawn = []
    for seed in (0, 0, 1):
        words = ["predict", "done", "--samples", 5, "--seed", seed, "--arch", FLOW, "--quiet"]
        status, out, err = still(capsys, *words)
        assert status == 0 and "samples.png" in out, err
        drawn.append(load_file("done/samples.safetensors")["samples"])
    assert drawn[0].shape == (5, 1, 8, 8) and (here / "done" / "samples.png").read_bytes()[1:4] == b"PNG"
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    status, _, err = still(capsys, "predict", "done", "--data", "digits:test", "--out", "log.csv", "--arch", FLOW,
                           "--quiet")
    assert status == 0, err
    values = [float(r["log_prob"]) for r in table("log.csv")]
    assert np.mean(values) == pytest.approx(-read_about("done").metrics["nll"], rel=0.01)


@pytest.fixture
def unet(here):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=10
    ).save_pretrained(here / "unet" / "unet")
    diffusers.DDPMScheduler(num_train_timesteps=50).save_pretrained(here / "unet" / "scheduler")


def test_a_conditional_sampler_draws_for_conditions(here, unet, capsys):
    status, out, err = still(capsys, "run", "dmd2", "--teacher", "diffusers:unet", "--student", "diffusers:unet",
                             "--real", "digits:labelled", "--conditional", "--config.steps", 1, "--config.batch", 4,
                             "--config.ratio", 1, "--quiet", "--out", "done", "--eval", "digits:test")
    assert status == 0 and "energy_distance" in out, err
    drawn = {}
    for given in ("0", "0,1", "digits:labelled"):
        status, _, err = still(capsys, "predict", "done", "--samples", 6, "--conditions", given, "--quiet", "--batch",
                               4)
        assert status == 0, err
        drawn[given] = load_file("done/samples.safetensors")["samples"]
    assert drawn["0"].shape == (6, 1, 8, 8)
    assert torch.equal(drawn["0"][::2], drawn["0,1"][::2]) and not torch.equal(drawn["0"][1], drawn["0,1"][1])
    status, _, err = still(capsys, "predict", "done", "--quiet")
    assert status == 2 and "--conditions" in err
    status, _, err = still(capsys, "predict", "done", "--data", "digits")
    assert status == 2 and "takes no --data" in err


def test_a_language_model_answers_prompts_and_is_scored(here, capsys):
    transformers = pytest.importorskip("transformers")
    from stillhouse.models.dual_encoders import word_tokenizer

    tokenizer = word_tokenizer(["red circle", "green square"], length=12)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=40, n_embd=8, n_layer=1, n_head=2, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)).save_pretrained("lm")
    tokenizer.save_pretrained("lm")
    pair = json.dumps({"prompt": "red circle", "response": "green square"})
    (here / "pairs.jsonl").write_text(f"{pair}\n" * 6)
    (here / "asked.jsonl").write_text('{"prompt": "Red circle"}\n\n{"prompt": "green"}\n')
    status, _, err = still(capsys, "run", "distillm", "--teacher", "hf:lm", "--student", "hf:lm", "--data",
                           "pairs.jsonl", "--validation", "pairs.jsonl", "--config.steps", 10, "--config.batch", 2,
                             "--config.max-new-tokens", 3, "--quiet", "--out", "done", "--eval", "pairs.jsonl")
    assert status == 0, err
    metrics = read_about("done").metrics
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"])) and 0 <= metrics["rouge_l"] <= 1
    logged = [json.loads(line) for log in (here / "done").rglob("log.jsonl") for line in log.read_text().splitlines()]
    assert len([line for line in logged if "eval_loss" in line and line["stage"].endswith("distil")]) == 10
    status, _, err = still(capsys, "predict", "done", "--data", "asked.jsonl", "--quiet")
    assert status == 0, err
    rows = [json.loads(line) for line in (here / "done" / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Red circle", "green"] and all("response" in row for row in rows)
    for _ in range(2):
        still(capsys, "predict", "done", "--data", "asked.jsonl", "--quiet", "--temperature", 1, "--seed", 3, "--out",
              f"drawn{_}.jsonl")
    assert (here / "drawn0.jsonl").read_bytes() == (here / "drawn1.jsonl").read_bytes()
    (here / "asked.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    assert "line 2" in still(capsys, "predict", "done", "--data", "asked.jsonl")[2]


def test_prompts_from_plain_lines(here):
    (here / "asked.txt").write_text("one\n\ntwo words\n")
    assert read_prompts(here / "asked.txt").prompt == ["one", "two words"]
    (here / "none.txt").write_text("\n")
    with pytest.raises(DataError, match="no lines"):
        read_prompts(here / "none.txt")


def test_scenes_are_rendered_from_all_sides(here, capsys):
    from stillhouse.models.scenes import SceneSet

    saved(SceneSet.load("nerf:count=2,samples=4"), About("prolificdreamer-vsd"))
    status, _, err = still(capsys, "predict", "done", "--size", 6)
    assert status == 0, err
    assert load_file("done/pictures.safetensors")["pictures"].shape == (16, 3, 6, 6)
    assert (here / "done" / "pictures.png").is_file()
    status, _, err = still(capsys, "eval", "done", "--data", "digits")
    assert status == 2 and "no score" in err


def test_the_means_of_speech(here, capsys):
    pytest.importorskip("transformers")
    from stillhouse.zoo.speech import hubert

    torch.manual_seed(0)
    model = hubert(16, 2, 2, 12, (6, 8, 8)).eval()
    model.config.mask_time_prob = 0.1
    about = about_run("dphubert", {"student": model}, None)
    saved(model, about)
    np.savez("sound.npz", audio=np.random.default_rng(0).normal(size=(5, 400)).astype("float32"))
    status, _, err = still(capsys, "predict", "done", "--data", "sound.npz", "--batch", 2, "--quiet")
    assert status == 0, err
    with torch.no_grad():
        sound = torch.from_numpy(np.load("sound.npz")["audio"])
        expected = torch.cat([model(part).last_hidden_state.mean(1) for part in sound.split(2)])
    torch.testing.assert_close(load_file("done/features.safetensors")["features"], expected)


def test_a_distilled_set_is_data_and_is_judged_by_fresh_networks(here, capsys):
    from stillhouse.data.distilled import DistilledSet

    some = digits(8, "labelled")
    saved(DistilledSet(some.image[:20], some.label[:20], 0.05),
          About("mtt", network={"text": "convnet:width=4,depth=1,image_size=8"}))
    status, _, err = still(capsys, "predict", "done")
    assert status == 2 and "--labelled FOLDER" in err
    scores = {}
    for steps in (1, 40):
        status, out, err = still(capsys, "eval", "done", "--data", "digits:test", "--steps", steps, "--out", "s.json")
        assert status == 0 and "accuracy" in out, err
        scores[steps] = json.loads((here / "s.json").read_text())["accuracy"]
    assert scores[40] > max(scores[1], 0.3)


def test_distilled_graphs_are_judged_by_a_fresh_network(here, capsys):
    pytest.importorskip("torch_geometric")
    status, out, err = still(capsys, "run", "mirage", "--labelled", "motifs:n=40", "--quiet", "--out", "done")
    assert status == 0 and "still run SLUG --labelled done/target" in out, err
    status, out, err = still(capsys, "eval", "done", "--data", "motifs:test,n=40", "--steps", 5, "--out", "s.json")
    assert status == 0, err
    assert set(json.loads((here / "s.json").read_text())) == {"data", "auc", "accuracy"}


def test_a_quantised_model_and_hidden_classes_are_used_and_scored(here, capsys):
    status, out, err = still(capsys, "run", "quantized-distillation", "--student", "tiny-convnet", "--labelled",
                             "digits16:labelled", "--config.rho", 0, "--config.steps", 10, "--config.batch", 8,
                             "--quiet", "--out", "small", "--eval", "digits16:test")
    assert status == 0 and "calibration_error" in out, err
    assert still(capsys, "predict", "small", "--data", "digits16:test", "--quiet")[0] == 0
    found = [int(r["label"]) for r in table("small/predictions.csv")]
    with torch.no_grad():
        assert found == stillhouse.load("small")(digits(16, "test").image).argmax(1).tolist()
    status, out, err = still(capsys, "run", "lls-ddfa", "--student", "mlp:classes=8", "--data", "domain-digits:n=80",
                             "--config.classes", 2, "--config.cells", 4, "--config.epochs", 1, "--quiet", "--out",
                             "hidden", "--eval", "digits:test")
    assert status == 0 and "nmi" in out, err
    assert still(capsys, "predict", "hidden", "--data", "digits:test", "--quiet")[0] == 0
    clusters = [int(r["cluster"]) for r in table("hidden/clusters.csv")]
    assert clusters == stillhouse.load("hidden").predict(digits(8, "test").image).tolist()


def test_an_interrupted_prediction_leaves_nothing(here, monkeypatch):
    model = classifier()
    data = TensorSet(image=torch.zeros(4, 1, 16, 16))

    def stop(indices):
        if 2 in list(indices):
            raise KeyboardInterrupt
        return TensorSet.batch(data, indices)

    monkeypatch.setattr(data, "batch", stop, raising=False)
    with pytest.raises(KeyboardInterrupt):
        predict(model, read_about("done"), data, "said.csv", batch=2, quiet=True)
    assert not list(here.glob("*said*"))


# ---------------------------------------------------------------------------------- scores


def test_scores_of_a_classifier(here, capsys):
    model = classifier()
    status, out, err = still(capsys, "eval", "done", "--data", "digits16:test", "--out", "s.json")
    assert status == 0 and "accuracy" in out, err
    found = json.loads((here / "s.json").read_text())
    assert found["accuracy"] == pytest.approx(accuracy(model, digits(16, "test")))
    assert 0 <= found["calibration_error"] <= 1 and len(found["per_class"]) == 10


def test_neighbours_are_found_within_the_set(here):
    data = TensorSet(image=torch.arange(60.0).view(60, 1, 1, 1).expand(-1, 1, 8, 8), label=torch.arange(60) // 30)
    about = About("wcord", kind="Encoder")
    assert score(torch.nn.Flatten(), about, data)["knn_accuracy"] > 0.8
    chance = data.with_fields(label=torch.randint(0, 2, (60,), generator=torch.Generator().manual_seed(0)))
    assert score(torch.nn.Flatten(), about, chance)["knn_accuracy"] < 0.7
    assert score(torch.nn.Flatten(), about, data) == score(torch.nn.Flatten(), about, data)


def test_class_folders_are_matched_by_name(here):
    from stillhouse.data.readers import read_data

    pictures(here / "own", ("b", "d"), size=16)
    data = read_data("own")
    assert labels_of(data, ["a", "b", "c", "d"]).tolist() == [1, 1, 1, 3, 3, 3]
    assert labels_of(data).tolist() == labels_of(data, ["0", "1"]).tolist() == [0, 0, 0, 1, 1, 1]
    for names in (["a", "b"], ["0", "1", "2"]):
        with pytest.raises(DataError, match=r"class '[bd]', which the model does not know"):
            labels_of(data, names)


def test_a_folder_with_some_of_the_classes_is_scored_by_their_names(here, capsys):
    model = classifier(classes=[f"c{i}" for i in range(10)])
    pictures(here / "own", ("c4", "c7"))
    status, _, err = still(capsys, "eval", "done", "--data", "own", "--out", "s.json")
    assert status == 0, err
    from stillhouse.data.readers import read_data

    data = read_data("own", size=16)
    with torch.no_grad():
        found = model(torch.stack([data[i]["image"] for i in range(6)])).argmax(-1)
    said = json.loads((here / "s.json").read_text())
    assert said["accuracy"] == pytest.approx((found == torch.tensor([4, 4, 4, 7, 7, 7])).double().mean().item())
    assert set(said["per_class"]) == {"c4", "c7"}


def test_columns_of_a_table_are_named(here, capsys):
    """A table with pictures as files beside it, their column and that of the labels under other names."""
    pytest.importorskip("pyarrow")
    pictures(here / "own", ("x", "y"), size=24)
    rows = "".join(f"own/{c}/{i}.png,{kind}\n" for kind, c in enumerate("xy") for i in range(3))
    (here / "table.csv").write_text(f"file,kind\n{rows}")
    columns = ["--columns", "image=file,label=kind"]
    classifier()
    status, out, err = still(capsys, "eval", "done", "--data", "table.csv", *columns)
    assert status == 0 and "accuracy" in out, err
    status, _, err = still(capsys, "predict", "done", "--data", "table.csv", "--columns", "image=file", "--quiet")
    assert status == 0 and len(table("done/predictions.csv")) == 6, err
    status, out, err = still(capsys, *RUN, "--eval", "table.csv", "--eval-columns", "image=file,label=kind")
    assert status == 0 and "calibration_error" in out, err
    assert still(capsys, *RUN, "--eval-columns", "image=file")[0] == 2


# ---------------------------------------------------------------------------------- while a run goes on


def _given():
    torch.manual_seed(0)
    teacher, student = (torch.nn.Sequential(
        torch.nn.Conv2d(1, width, 3), torch.nn.BatchNorm2d(width), torch.nn.ReLU(), torch.nn.Dropout(0.3),
        torch.nn.Flatten(), torch.nn.Linear(width * 36, 10)) for width in (4, 2))
    data = digits(8, "labelled")
    return {"teacher": teacher, "student": student, "data": data.without("label"),
            "config": ssld.Config(steps=30, batch=16, per_class=None, last_stage=0.0, lr=0.1, view=1.0)}


def _look(student):
    torch.rand(7)
    return watcher(About("ssld", kind="Classifier"), digits(8, "test").select(range(50)))(student)


def test_a_run_with_evaluation_is_bit_for_bit_one_without(tmp_path):
    plain = ssld.distill(**_given(), run=Run(tmp_path / "a", quiet=True))
    run = Run(tmp_path / "b", quiet=True, evaluate=_look)
    looked = ssld.distill(**_given(), run=run)
    seen = [line for line in run.history if "eval_accuracy" in line]
    assert [line["k"] for line in seen] == list(range(2, 30, 3))
    assert len({line["eval_accuracy"] for line in seen}) > 1
    assert all(torch.equal(v, looked.state_dict()[k]) for k, v in plain.state_dict().items())
    state = looked.state_dict()
    for _ in range(40):
        with Run(tmp_path / "c", quiet=True, evaluate=_look, checkpoint_steps=1) as again:
            again.stop()
            try:
                stopped = ssld.distill(**_given(), run=again)
                break
            except Interrupted:
                continue
    assert all(torch.equal(v, state[k]) for k, v in stopped.state_dict().items())
    logs = [[json.loads(line) for line in log.read_text().splitlines()] for name in "bc"
            for log in (tmp_path / name).rglob("log.jsonl")]
    assert len(logs) == 2 and logs[0] == logs[1]


def test_only_the_student_is_looked_at():
    about, data, student = About("ssld", kind="Classifier"), digits(16, "test").select(range(20)), TinyConvNet()
    look = watcher(about, data, student)
    assert set(look(student)) == {"accuracy", "calibration_error"} and look(TinyConvNet()) == {}
    for about in (About("lls-ddfa", kind="Classifier"), About("mtt"), About("dmd2", kind="Denoiser")):
        assert watcher(about, data) is None


def test_curves_of_evaluations_are_in_the_report(here, capsys):
    words = ["--teacher", "tiny-convnet", "--student", "tiny-convnet", "--data", "digits16:labelled", "--quiet"]
    status, _, err = still(capsys, "run", "ssld", *words, "--config.steps", 12, "--config.batch", 16,
                           "--config.per-class", "None", "--out", "done", "--eval", "digits16:test")
    assert status == 0, err
    assert still(capsys, "report", "done")[0] == 0
    assert "eval_accuracy" in (here / "done" / "report.html").read_text()


# ---------------------------------------------------------------------------------- bad input


RUN = ["run", "ssld", "--teacher", "tiny-convnet", "--student", "tiny-convnet", "--data", "digits16:labelled",
       "--config.steps", "2", "--config.batch", "8", "--quiet", "--out", "mine"]


@pytest.mark.parametrize("words, status, says", [
    (["predict", "nowhere", "--data", "digits"], 1, "no such folder"),
    (["predict", "half", "--data", "digits"], 1, "the run is not finished"),
    (["predict", "file", "--data", "digits"], 1, "no such folder"),
    (["eval", "half", "--data", "digits"], 1, "the run is not finished"),
    (["predict", "done"], 2, "give --data"),
    (["predict", "done", "--data", "absent"], 1, "absent"),
    (["predict", "done", "--data", "digits16", "--batch", "0"], 2, "at least 1"),
    (["predict", "done", "--data", "digits16", "--temperature", "-1"], 2, "temperature"),
    (["predict", "done", "--data", "digits16", "--device", "cuda:9"], 2, "not available"),
    (["predict", "done", "--data", "digits16", "--out", "file/x.csv"], 1, "cannot write"),
    (["predict", "done", "--data", "digits16", "--sample", "3"], 2, "unrecognized"),
    (["predict", "done", "--data", "colour.npz"], 1, "could not process data of {'image': [3, 16, 16]}"),
    (["eval", "done", "--data", "colour.npz"], 1, "has no field 'label'"),
    (["eval", "done", "--data", "loose"], 1, "has no labels"),
    (["eval", "done", "--data", "many.npz"], 1, "the label 11"),
    (["predict", "done", "--data", "nan.npz"], 1, "NaN"),
    ([*RUN, "--eval", "colour.npz"], 1, "has no field 'label'"),
    ([*RUN, "--eval", "many.npz"], 1, "the label 11"),
    ([*RUN, "--eval", "wide.npz"], 1, "could not process data of {'image': [3, 16, 16]"),
    (["run", "ssld", "--eval", "digits"], 2, "goes with roles"),
    (["predict", "coded", "--data", "digits16"], 2, "--arch mynets:net"),
])
def test_bad_input_is_answered_before_any_work(here, capsys, words, status, says):
    classifier()
    save(TinyConvNet(), "coded/target", About("ssld", kind="Classifier", network={"text": "mynets:net"}))
    (here / "half").mkdir()
    (here / "half" / "run.json").write_text('{"system": "ssld", "fingerprint": {"data": "ab"}}')
    (here / "file").write_text("")
    pictures(here / "loose" / "x", ("y",), size=16)
    (here / "loose" / "x" / "y").rename(here / "loose2")
    (here / "loose" / "x").rmdir()
    (here / "loose").rmdir()
    (here / "loose2").rename(here / "loose")
    colour, label = np.zeros((12, 3, 16, 16), "float32"), np.arange(12)
    np.savez("colour.npz", image=colour)
    np.savez("wide.npz", image=colour, label=label % 3)
    np.savez("many.npz", image=colour[:, :1], label=label)
    np.savez("nan.npz", image=colour[:, :1] * np.nan)
    found, out, err = still(capsys, *words)
    said = " ".join((err + " " + " ".join(out.split())).replace("│", " ").split())
    assert found == status, said
    assert says.lower() in said.lower() and "Traceback" not in said
    assert not list(here.glob("*.csv")) and not (here / "mine").exists()


def test_damaged_results_are_named(here):
    classifier()
    place = here / "done" / "target"
    whole, said = (place / "model.safetensors").read_bytes(), (place / "target.json").read_text()
    (place / "model.safetensors").write_bytes(whole[:200])
    with pytest.raises(DamagedFileError, match=r"model\.safetensors"):
        stillhouse.load("done")
    (place / "model.safetensors").unlink()
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        stillhouse.load("done")
    (place / "model.safetensors").write_bytes(whole)
    for text, says in ((said[:40], "cannot read"), ("[]", "no JSON object"), ('{"kind": "Classifier"}', "as it was"),
                       (said.replace('"classes": []', '"classes": 3'), "'classes' is 3"),
                       (said.replace('"ssld"', "7"), "'system' is 7")):
        (place / "target.json").write_text(text)
        with pytest.raises(DamagedFileError, match=says):
            stillhouse.load("done")


def test_a_sampler_whose_settings_are_damaged(here, unet, capsys):
    words = ["--teacher", "diffusers:unet", "--student", "diffusers:unet", "--data", "digits:labelled"]
    status, _, err = still(capsys, "run", "progressive-distillation", *words, "--conditional", "--config.start", 2,
                           "--config.end", 1, "--config.steps", 1, "--config.batch", 4, "--quiet", "--out", "done")
    assert status == 0, err
    settings = next((here / "done" / "target").rglob("sampler.json"))
    settings.write_text("{}")
    with pytest.raises(DamagedFileError, match="do not fit each other"):
        stillhouse.load("done")


def test_a_result_without_a_score_in_python():
    with pytest.raises(ConfigError, match="cannot be used"):
        score(torch.nn.Flatten(), About("ssld"), digits(8, "test"))
    with pytest.raises(DataError, match="empty"):
        score(torch.nn.Flatten(), About("wcord", kind="Encoder"), digits(8, "test").select([]))


def test_saving_twice_gives_the_same_files(here):
    model = classifier()
    again = stillhouse.load("done")
    save(again, "again", read_about("done"))
    assert store.load_tree("again/model.safetensors").keys() == model.state_dict().keys()
    assert (here / "again" / "target.json").read_text() == (here / "done" / "target" / "target.json").read_text()
