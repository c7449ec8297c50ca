"""Whole pipelines of diffusers: read as denoisers with their texts and latents, and written from few-step samplers."""

import json

import pytest
import torch
from safetensors.torch import save_file

import stillhouse
from stillhouse.cli import main
from stillhouse.data.sets import TensorSet
from stillhouse.diffusion.grids import uniform
from stillhouse.diffusion.samplers import FewStepSampler
from stillhouse.errors import DamagedFileError, DataError, RoleError, StoreError
from stillhouse.protocols import Denoiser

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from stillhouse.hub.diffusers import TextToImage, from_diffusers, pack_sd3  # noqa: E402
from stillhouse.hub.latents import encoded, prompts, text_to_image_among  # noqa: E402
from stillhouse.hub.models import resolve_model  # noqa: E402
from stillhouse.hub.pipelines import save_pipeline  # noqa: E402


def unet(**options):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
                                 block_out_channels=(8, 8), down_block_types=("DownBlock2D", "DownBlock2D"),
                                 up_block_types=("UpBlock2D", "UpBlock2D"), **options).eval()


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """The folder of a random Stable Diffusion with latents of 4 x 8 x 8."""
    folder = tmp_path_factory.mktemp("sd")
    letters = [chr(i) for i in range(97, 123)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    torch.manual_seed(0)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, eos_token_id=len(words) - 1))
    network = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 8),
        cross_attention_dim=8, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1,
                                  down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2)
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                        steps_offset=1, clip_sample=False)
    diffusers.StableDiffusionPipeline(vae, text, tokenizer, network, scheduler, None, None,
                                      requires_safety_checker=False).save_pretrained(folder / "whole")
    return folder / "whole"


def test_a_whole_stable_diffusion_is_read_with_its_texts_and_latents(stable):
    teacher = resolve_model(f"diffusers:{stable}", Denoiser)
    assert type(teacher) is TextToImage and text_to_image_among([None, teacher]) is teacher
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(stable)
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.9])
    condition = teacher.embed(["a cat", "dogs"])
    steps = (t * 1000).round().long() - 1
    with torch.no_grad():
        eps = pipeline.unet(x_t, steps, encoder_hidden_states=condition).sample
        abar = pipeline.scheduler.alphas_cumprod[steps].view(2, 1, 1, 1)
        wanted = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
        torch.testing.assert_close(teacher(x_t, t, condition), wanted, rtol=1e-4, atol=1e-4)
    theirs = pipeline.encode_prompt(["a cat", "dogs"], "cpu", 1, False)[0]
    torch.testing.assert_close(condition, theirs)


def test_pictures_become_latents_and_lines_conditions(stable, tmp_path):
    teacher = resolve_model(f"diffusers:{stable}", Denoiser)
    pictures = TensorSet(x=torch.rand(5, 3, 16, 16) * 2 - 1, text=list("abcde"))
    latents = encoded(pictures, teacher, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(latents.x, teacher.encode(pictures.x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latents.condition, teacher.embed(list("abcde")), rtol=1e-4, atol=1e-5)
    assert encoded(latents, teacher) is latents
    with pytest.raises(RoleError, match="colour"):
        encoded(TensorSet(x=torch.zeros(2, 1, 16, 16)), teacher)
    (tmp_path / "p.txt").write_text("a cat\n\na dog\n")
    assert prompts(tmp_path / "p.txt", teacher).condition.shape == (2, 8, 8)
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("empty.txt", "none.txt"):
        with pytest.raises(DataError):
            prompts(tmp_path / name, teacher)


def test_a_pipeline_is_distilled_from_the_command_line(stable, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\na tree\n")
    main(["run", "dmd2", "--teacher", f"diffusers:{stable}", "--student", f"diffusers:{stable}", "--conditions",
          "prompts.txt", "--config.steps", "2", "--config.batch", "2", "--config.gan", "0", "--config.shape", "4", "8",
          "8", "--out", "done", "--quiet"])
    sampler = stillhouse.load("done")
    assert isinstance(sampler, FewStepSampler)
    assert sampler(torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8)).isfinite().all()


@pytest.mark.parametrize(("mode", "clip"), [("ddim", None), ("ddim", 1.0), ("renoise", None)])
def test_a_sampler_becomes_a_pipeline_that_draws_the_same(tmp_path, mode, clip):
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=64, prediction_type="v_prediction", clip_sample=False,
                                        rescale_betas_zero_snr=True)
    sampler = FewStepSampler(from_diffusers(unet(), scheduler), uniform(4), mode, clip)
    save_pipeline(sampler, tmp_path)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    call = json.loads((tmp_path / "sampling.json").read_text())
    assert call["num_inference_steps"] == 4
    drawn = pipeline(batch_size=2, generator=torch.Generator().manual_seed(3), output_type="np", **call).images
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, 1, 8, 8, generator=generator)
    with torch.no_grad():
        ours = sampler(z, noise=lambda x: torch.randn(x.shape, generator=generator))
    wanted = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert wanted.std() > 0.01
    torch.testing.assert_close(torch.from_numpy(drawn), wanted, rtol=0, atol=2e-4)


def test_a_text_sampler_becomes_a_whole_stable_diffusion(stable, tmp_path):
    teacher = resolve_model(f"diffusers:{stable}", Denoiser)
    sampler = FewStepSampler(teacher, uniform(2))
    save_pipeline(sampler, tmp_path)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    z = torch.randn(1, 4, 8, 8)
    call = json.loads((tmp_path / "sampling.json").read_text())
    start = teacher.process.prior(z)
    drawn = pipeline("a cat", latents=start, output_type="latent", height=16, width=16, **call).images
    with torch.no_grad():
        wanted = sampler(z, teacher.embed(["a cat"]))
    torch.testing.assert_close(drawn, wanted, rtol=1e-3, atol=1e-3)


def test_what_no_pipeline_takes_is_named(tmp_path):
    scheduler = diffusers.DDIMScheduler()
    for network, words in ((unet(num_class_embeds=3), "class-conditional"),
                           (diffusers.DiTTransformer2DModel(
                               num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=4, num_layers=1,
                               sample_size=8, norm_num_groups=1, num_embeds_ada_norm=5), "latents")):
        with pytest.raises(StoreError, match=words):
            save_pipeline(FewStepSampler(from_diffusers(network, scheduler), uniform(2)), tmp_path)
    uneven = FewStepSampler(from_diffusers(unet(), scheduler), (1.0, 0.75, 0.5, 0.0), "renoise")
    with pytest.raises(StoreError, match="uniform times"):
        save_pipeline(uneven, tmp_path)
    short = FewStepSampler(from_diffusers(unet(), diffusers.DDIMScheduler(num_train_timesteps=64)), uniform(2))
    with pytest.raises(StoreError, match="starts from 1"):
        save_pipeline(short, tmp_path)


def test_transformers_of_text_to_image(tmp_path):
    torch.manual_seed(0)
    sd3 = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=6, out_channels=4,
        pos_embed_max_size=8).eval()
    pixart = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=8, caption_channels=8, norm_num_groups=1).eval()
    tokens, pooled, x = torch.randn(2, 3, 8), torch.randn(2, 6), torch.randn(2, 4, 8, 8)
    for network, scheduler, condition in (
            (sd3, diffusers.FlowMatchEulerDiscreteScheduler(), pack_sd3(tokens, pooled)),
            (pixart, diffusers.DDIMScheduler(clip_sample=False), tokens)):
        folder = tmp_path / type(network).__name__
        network.save_pretrained(folder / "transformer")
        scheduler.save_pretrained(folder / "scheduler")
        denoiser = resolve_model(f"diffusers:{folder}", Denoiser).eval()
        t = torch.full((2,), 0.6)
        with torch.no_grad():
            if network is sd3:
                raw = sd3(x, timestep=t * 1000, encoder_hidden_states=tokens, pooled_projections=pooled).sample
                wanted = x - 0.6 * raw
            else:
                raw = pixart(x, timestep=t * 1000 - 1, encoder_hidden_states=tokens, added_cond_kwargs={
                    "resolution": None, "aspect_ratio": None}).sample[:, :4]
                wanted = scheduler.step(raw, 599, x).pred_original_sample if _steps(scheduler) else None
            torch.testing.assert_close(denoiser(x, t, condition), wanted, rtol=1e-4, atol=1e-4)
            with pytest.raises(RoleError, match="text embeddings"):
                denoiser(x, t)


def _steps(scheduler):
    scheduler.set_timesteps(1000)
    return True


def test_bad_folders_are_refused(stable, tmp_path):
    import shutil

    def copy(name):
        return shutil.copytree(stable, tmp_path / name)

    bare = copy("pickled")
    (bare / "vae" / "diffusion_pytorch_model.safetensors").rename(bare / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(RoleError, match="pickle"):
        resolve_model(f"diffusers:{bare}", Denoiser)
    cut = copy("cut")
    (cut / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(DamagedFileError, match="empty"):
        resolve_model(f"diffusers:{cut}", Denoiser)
    other = copy("other")
    save_file({"x": torch.zeros(1)}, other / "text_encoder" / "model.safetensors")
    said = json.loads((other / "text_encoder" / "config.json").read_text())
    (other / "text_encoder" / "config.json").write_text(json.dumps({**said, "model_type": "t5"}))
    with pytest.raises(RoleError, match="that of CLIP"):
        resolve_model(f"diffusers:{other}", Denoiser)
    without = copy("without")
    shutil.rmtree(without / "scheduler")
    with pytest.raises(RoleError, match="scheduler"):
        resolve_model(f"diffusers:{without}", Denoiser)
