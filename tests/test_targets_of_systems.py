"""The result of every built system, from words that a user types, loaded from its folder alone."""

import json

import numpy as np
import pytest
import torch

import stillhouse
from stillhouse import catalog
from stillhouse.cli import main
from stillhouse.deploy import targets
from stillhouse.protocols import modules_of
from stillhouse.testing import target_digest

FLOW = "stillhouse.models.flows:point_flow:couplings=2,width=4"
DIFFUSERS = ["--teacher", "diffusers:unet", "--student", "diffusers:unet"]
WORDS = {
    "ssld": ["--teacher", "tiny-convnet", "--student", "hf:vit", "--data", "digits16:test", "--config.steps", "2",
             "--config.batch", "8", "--config.per-class", "None"],
    "kd-survey": ["--student", "tiny-convnet", "--teacher", "tiny-convnet", "--labelled", "digits16:test",
                  "--validation", "digits16:labelled", "--config.steps", "2", "--config.batch", "8",
                  "--config.trial", "0.5"],
    "diswot": ["--teacher", "resnet:width=4", "--labelled", "digits16:test", "--config.steps", "2", "--config.batch",
               "8", "--config.cycles", "3", "--config.population", "2", "--config.tournament", "1", "--config.width",
               "2"],
    "promptkd": ["--teacher", "hf:clip", "--student", "hf:clip", "--unlabelled", "colour.npz", "--classes",
                 "names.txt", "--config.epochs", "1", "--config.depth", "2", "--config.tuning.epochs", "0"],
    "meal-v2": ["--teachers", "tiny-convnet,hf:vit", "--student", "tiny-convnet", "--data", "digits16:test",
                "--config.steps", "2", "--config.batch", "8"],
    "distillweighted": ["--teachers", "tiny-convnet:classes=7,hf:vit", "--student", "tiny-convnet", "--labelled",
                        "digits16:labelled", "--unlabelled", "digits16:test", "--config.steps", "2", "--config.batch",
                        "8", "--config.unlabelled-batch", "8"],
    "guided-self-distillation": ["--network", "tiny-convnet", "--labelled", "digits16:labelled", "--validation",
                                 "digits16:labelled", "--config.steps", "3", "--config.rounds", "2"],
    "sd-label-noise": ["--network", "mlp:inputs=256", "--labelled", "digits16:labelled", "--validation",
                       "digits16:labelled", "--config.steps", "30", "--config.xi", "1", "1.5"],
    "quantized-distillation": ["--student", "tiny-convnet", "--teacher", "tiny-convnet", "--labelled", "digits16:test",
                               "--config.steps", "2", "--config.batch", "8"],
    "mekd": ["--teacher", "tiny-convnet", "--student", "tiny-convnet:width=4", "--unlabelled", "digits16:test",
             "--config.steps", "2", "--config.emulation", "0.5", "--config.batch", "4", "--config.gan-batch", "4",
             "--config.width", "4"],
    "mdcs": ["--student", "resnet:width=4", "--labelled", "digits16:test", "--config.steps", "2", "--config.batch", "8",
             "--config.exponents", "-0.5", "2.5"],
    "wcord": ["--teacher", "tiny-convnet", "--student", "resnet:width=4", "--data", "digits16:test",
              "--config.steps", "2", "--config.batch", "4", "--config.negatives", "5", "--config.width", "6"],
    "born-again": ["--network", "tiny-convnet", "--labelled", "digits16:test", "--config.steps", "3",
                   "--config.batch", "8", "--config.generations", "2", "--config.result", "ensemble"],
    "msdcrd": ["--teacher", "tiny-convnet", "--student", "hf:vit", "--data", "digits16:test", "--config.steps", "2",
               "--config.batch", "8"],
    "sla": ["--student", "tiny-convnet", "--labelled", "digits16:test", "--config.steps", "2", "--config.batch", "8",
            "--config.inference", "aggregated"],
    "kd-data-pruning": ["--student", "tiny-convnet", "--labelled", "digits16:test", "--config.steps", "6",
                        "--config.batch", "8", "--config.prune", "forgetting", "--config.repeats", "1"],
    "mtt": ["--network", "convnet:width=4,depth=1,image_size=8", "--labelled", "digits:labelled", "--config.steps",
            "1", "--config.experts", "1", "--config.epochs", "2", "--config.student-steps", "1",
            "--config.expert-epochs", "1", "--config.max-start", "1"],
    "mirage": ["--labelled", "motifs:n=40"],
    "fedx": ["--network", "conv-encoder:width=4,depth=1,image_size=8", "--clients", "digits:labelled,digits:labelled",
             "--config.rounds", "1", "--config.epochs", "1", "--config.hidden", "6", "--config.out", "5"],
    "dmd2": [*DIFFUSERS, "--real", "digits:labelled", "--config.steps", "2", "--config.ratio", "2",
             "--config.batch", "4"],
    "progressive-distillation": [*DIFFUSERS, "--data", "digits:labelled", "--config.start", "4", "--config.end", "1",
                                 "--config.steps", "1", "--config.batch", "4"],
    "consistency-models": ["--teacher", "diffusers:edm", "--student", "diffusers:edm", "--data", "digits:labelled",
                           "--config.steps", "2", "--config.batch", "4", "--config.metric", "l2",
                           "--config.boundary", "free", "--config.points", "4"],
    "real-nvp": ["--student", FLOW, "--data", "gauss2d:n=64", "--config.steps", "2", "--config.batch", "8"],
    "distillm": ["--teacher", "hf:gpt2", "--student", "hf:gpt2", "--data", "pairs.jsonl", "--validation",
                 "pairs.jsonl", "--config.steps", "2", "--config.batch", "2", "--config.max-new-tokens", "3"],
    "scan": ["--student", "conv-encoder:width=4,depth=1,image_size=8", "--data", "digits:labelled",
             "--config.pretext-steps", "1", "--config.pretext-batch", "16", "--config.scan-epochs", "1",
             "--config.most-epochs", "1", "--config.label-epochs", "1", "--config.guard", "0",
             "--config.clusters", "3"],
    "lls-ddfa": ["--student", "mlp:classes=8", "--data", "domain-digits:n=80", "--config.classes", "2",
                 "--config.cells", "4", "--config.epochs", "1"],
    "simclrv2": ["--teacher", "conv-encoder:width=4,depth=1,image_size=16", "--student", "tiny-convnet", "--labelled",
                 "digits16:labelled", "--unlabelled", "digits16:labelled", "--config.steps", "1", "--config.batch",
                 "8", "--config.fine-tune-batch", "8"],
    "prolificdreamer-vsd": ["--teacher", "zoo:gauss2d", "--scenes", "points:count=4", "--config.steps", "2",
                            "--config.fake", "exact", "--config.guidance", "1"],
    "fantastic-gains": ["--teachers", "tiny-convnet,resnet:width=4", "--student", "hf:vit", "--labelled",
                        "digits16:labelled", "--config.steps", "2", "--config.batch", "8", "--config.slow-every", "1"],
    "unic": ["--teachers", "hf:vit,vit:classes=0,depth=2,width=8", "--student",
             "vit:classes=0,depth=1,patch=8,width=12", "--data", "digits16:test", "--config.steps", "2",
             "--config.batch", "8", "--config.hidden", "4"],
    "dphubert": ["--teacher", "hf:hubert", "--student", "hf:hubert", "--data", "sound.npz", "--config.steps", "3",
                 "--config.batch", "2", "--config.layers", "0", "1"],
    "ofa-kd": ["--teacher", "vit:depth=1", "--student", "tiny-convnet", "--labelled", "digits16:test", "--config.steps",
               "2", "--config.batch", "8"],
    "bd-kd": ["--student", "tiny-convnet", "--network", "resnet:width=4", "--labelled", "digits16:test",
              "--config.steps", "2", "--config.batch", "8"],
    "rad": ["--teacher", "tiny-convnet", "--student", "hf:vit", "--labelled", "digits16:labelled", "--unlabelled",
            "digits16:test", "--validation", "digits16:labelled", "--config.steps", "2", "--config.batch", "8",
            "--config.rounds", "1", "--config.queries", "4"],
    "sd-darts": ["--labelled", "digits:labelled", "--config.steps", "4", "--config.search", "0.5",
                 "--config.batch", "8", "--config.nodes", "2", "--config.cells", "2", "--config.channels", "2",
                 "--config.final-cells", "2", "--config.final-channels", "2", "--config.interval", "1",
                 "--config.final.batch", "8"],
    "amd": ["--teacher", "vit:depth=2,width=8,heads=2", "--labelled", "digits16:test", "--validation",
            "digits16:labelled", "--config.steps", "6", "--config.batch", "8", "--config.scale", "0.6",
            "--config.candidates", "0.7", "0.8"],
    "nonresidual-kd": ["--teacher", "tiny-convnet", "--student", "resnet:width=4", "--labelled", "digits16:test",
                       "--config.steps", "2", "--config.batch", "8"],
}


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """A folder with tiny random models, as their libraries save them, and files of data."""
    transformers = pytest.importorskip("transformers")
    diffusers = pytest.importorskip("diffusers")
    from stillhouse.models.dual_encoders import clip, word_tokenizer
    from stillhouse.zoo.speech import hubert

    here = tmp_path_factory.mktemp("typed")
    rng = np.random.default_rng(0)
    np.savez(here / "colour.npz", image=rng.normal(size=(8, 3, 8, 8)).astype("float32"))
    np.savez(here / "sound.npz", audio=rng.normal(size=(6, 400)).astype("float32"))
    (here / "names.txt").write_text("red circle\ngreen square\nblue ring\n")
    pair = {"prompt": "red circle", "response": "green square"}
    (here / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for _ in range(4)))
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["a photo of a .", "red circle", "green square", "blue ring"], length=12)
    made = {
        "clip": clip(tokenizer, width=8, layers=2, heads=2, patch=4, image=8, text_layers=1, length=12, text_width=8),
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=len(tokenizer), n_positions=300, n_embd=8, n_layer=1, n_head=2,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id)),
        "vit": transformers.ViTForImageClassification(transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16,
            patch_size=8, num_channels=1, num_labels=10)),
        "hubert": hubert(16, 2, 2, 12, (6, 8, 8)),
    }
    made["gpt2"].generation_config.suppress_tokens = [2]
    for name, model in made.items():
        model.save_pretrained(here / name)
    for name in ("clip", "gpt2"):
        tokenizer.save_pretrained(here / name)
    for name, scheduler in (("unet", diffusers.DDPMScheduler(num_train_timesteps=50)),
                            ("edm", diffusers.EDMEulerScheduler(num_train_timesteps=50))):
        scheduler.save_pretrained(here / name / "scheduler")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    for name in ("unet", "edm"):
        unet.save_pretrained(here / name / "unet")
    return here


def outputs(target):
    """What a target gives for fixed inputs."""
    for module in modules_of(target, *getattr(target, "__dict__", {}).values()):
        module.eval()
    torch.manual_seed(3)
    name = type(target).__name__
    with torch.no_grad():
        match name:
            case "DistilledSet":
                return target.images, target.labels, torch.tensor(target.lr)
            case "GraphSet":
                return target.batch([0, 1])["graph"][1].x, target.label
            case "SceneSet":
                return target.render(torch.arange(len(target)))
            case "FlowDensity":
                return target.log_prob(torch.randn(3, 2)), target.sample(4)
            case "FewStepSampler" | "SamplerLadder":
                return target(torch.randn(2, 1, 8, 8))
            case "GPT2LMHeadModel":
                ids = torch.arange(4)[None]
                return target(ids).logits, target.generate(ids, max_new_tokens=4)
            case "LatentClasses":
                return target.posterior(torch.randn(3, 1, 8, 8))
            case "Clustering":
                return target.probabilities(torch.randn(3, 1, 8, 8))
            case "Projected":
                z = target(torch.randn(3, 1, 8, 8))
                return z, target.predict(z), target.encode(torch.randn(3, 1, 8, 8))
            case "VectorClassifier":
                return target(torch.randn(3, 3, 8, 8))
        if "Hubert" in name:
            return target(torch.randn(2, 400)).last_hidden_state
        return target(torch.randn(3, 1, 16, 16))


def test_every_built_system_has_its_words():
    assert set(WORDS) == {s.slug for s in catalog.systems().values() if s.built}


@pytest.mark.parametrize("slug", WORDS)
def test_a_result_is_loaded_from_its_folder_as_it_was(slug, typed, tmp_path, monkeypatch, capsys):
    for extra in catalog.find(slug).extras:
        for name in catalog.EXTRAS[extra]:
            pytest.importorskip(name)
    kept, save = [], targets.save
    monkeypatch.setattr(targets, "save", lambda target, *rest: (kept.append(target), save(target, *rest))[1])
    monkeypatch.chdir(tmp_path)
    for file in typed.iterdir():
        (tmp_path / file.name).symlink_to(file)
    main(["run", slug, *WORDS[slug], "--quiet", "--out", "done"])
    said = capsys.readouterr().out
    assert "stillhouse.load('done')" in said
    for file in typed.iterdir():
        (tmp_path / file.name).unlink()
    loaded = stillhouse.load("done", arch=FLOW if slug == "real-nvp" else None)
    assert [type(loaded).__name__] == [type(t).__name__ for t in kept]
    assert target_digest(loaded) == target_digest(kept[0])
    assert all(not m.training for m in modules_of(loaded))
    torch.testing.assert_close(outputs(loaded), outputs(kept[0]), rtol=0, atol=0)
    if slug == "distillm":
        assert loaded.generation_config.suppress_tokens == [2]
