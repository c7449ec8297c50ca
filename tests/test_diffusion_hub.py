"""Networks of `diffusers` as Denoisers, on tiny random configurations."""

import json

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from stillhouse.diffusion import grids  # noqa: E402
from stillhouse.diffusion.guidance import Guided  # noqa: E402
from stillhouse.diffusion.process import Flow, VPTable  # noqa: E402
from stillhouse.diffusion.samplers import FewStepSampler  # noqa: E402
from stillhouse.errors import RoleError, StoreError  # noqa: E402
from stillhouse.hub.diffusers import from_diffusers, pack_sdxl, save_pretrained  # noqa: E402
from stillhouse.parts.discriminators import head_for  # noqa: E402


def unet(**options):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
                                 block_out_channels=(8, 8), down_block_types=("DownBlock2D", "DownBlock2D"),
                                 up_block_types=("UpBlock2D", "UpBlock2D"), **options).eval()


def text_unet(**options):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 8),
        cross_attention_dim=6, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **options).eval()


def dit():
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=4,
                                           num_layers=3, sample_size=8, norm_num_groups=1,
                                           num_embeds_ada_norm=5).eval()


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_x0_is_that_of_the_scheduler(prediction):
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=100, prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(100)
    denoiser = from_diffusers(unet(), scheduler)
    assert isinstance(denoiser.process, VPTable)
    for k in (0, 37, 99):
        x_t = torch.randn(3, 1, 8, 8)
        with torch.no_grad():
            raw = denoiser.network.model(x_t, k).sample
            expected = scheduler.step(raw, k, x_t).pred_original_sample
            got = denoiser(x_t, torch.full((3,), (k + 1) / 100))
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_flow_matching_scheduler():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    denoiser = from_diffusers(unet(), scheduler)
    assert denoiser.process == Flow()
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([0.25, 0.7])
    with torch.no_grad():
        velocity = denoiser.network.model(x_t, 1000 * t).sample
        assert torch.allclose(denoiser(x_t, t), x_t - t.view(-1, 1, 1, 1) * velocity, atol=1e-6)


def test_noise_is_added_as_the_scheduler_does():
    scheduler = diffusers.DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    process = from_diffusers(unet(), scheduler).process
    x, eps, k = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999])
    expected = scheduler.add_noise(x, eps, k)
    assert torch.allclose(process.noise(x, (k + 1) / 1000, eps), expected, atol=1e-5)
    assert process.alpha(torch.ones(1)).item() == pytest.approx(0, abs=1e-6)


def test_classes_and_text_and_learned_variance():
    scheduler = diffusers.DDIMScheduler()
    t = torch.tensor([0.3, 0.9])
    labelled = from_diffusers(unet(num_class_embeds=3), scheduler)
    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(labelled(x, t, torch.tensor([0, 1])), labelled(x, t, torch.tensor([2, 2])))
    transformer = from_diffusers(dit(), scheduler)
    x = torch.randn(2, 2, 8, 8)
    assert transformer(x, t, torch.tensor([0, 4])).shape == x.shape and transformer.null_condition.item() == 5
    assert Guided(transformer, 2.0)(x, t, torch.tensor([0, 4])).isfinite().all()
    text = from_diffusers(text_unet(), scheduler, null_condition=torch.zeros(3, 6))
    x = torch.randn(2, 4, 8, 8)
    assert Guided(text, 2.0)(x, t, torch.randn(2, 3, 6)).shape == x.shape
    with pytest.raises(RoleError, match="text embeddings"):
        text(x, t)


def test_sdxl_condition_is_unpacked_into_its_three_parts():
    model = text_unet(addition_embed_type="text_time", addition_time_embed_dim=2,
                      projection_class_embeddings_input_dim=17)
    tokens, pooled, ids = torch.randn(2, 3, 6), torch.randn(2, 5), torch.randn(2, 6)
    denoiser = from_diffusers(model, diffusers.DDIMScheduler())
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.5])
    with torch.no_grad():
        raw = model(x, torch.tensor([499.0, 499.0]), tokens,
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
        assert torch.equal(denoiser.output(x, t, pack_sdxl(tokens, pooled, ids)), raw)


@pytest.mark.parametrize("make,x,condition", [
    (unet, torch.randn(2, 1, 8, 8), None),
    (text_unet, torch.randn(2, 4, 8, 8), torch.randn(2, 3, 6)),
    (dit, torch.randn(2, 2, 8, 8), torch.tensor([0, 1])),
], ids=["unet", "text", "dit"])
def test_bottleneck_features_feed_a_discriminator(make, x, condition):
    denoiser = from_diffusers(make(), diffusers.DDIMScheduler())
    x = x.clone().requires_grad_()
    features = denoiser.features(x, torch.tensor([0.2, 0.8]), condition)
    head_for(features)(features).sum().backward()
    assert x.grad.abs().sum() > 1e-4


def test_exported_sampler_gives_the_same_samples_in_diffusers(tmp_path):
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=64, prediction_type="v_prediction", clip_sample=False)
    sampler = FewStepSampler(from_diffusers(unet(), scheduler), grids.uniform(4), clip=1.0)
    z = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        ours = sampler(z)
    save_pretrained(sampler, tmp_path)
    model = diffusers.UNet2DModel.from_pretrained(tmp_path / "network")
    theirs_scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    theirs_scheduler.set_timesteps(4)
    listed = json.loads((tmp_path / "timesteps.json").read_text())
    assert theirs_scheduler.timesteps.tolist() == listed == [63, 47, 31, 15]
    x = sampler.denoiser.process.prior(z)
    with torch.no_grad():
        for k in theirs_scheduler.timesteps:
            x = theirs_scheduler.step(model(x, k).sample, k, x, use_clipped_model_output=True).prev_sample
    assert torch.allclose(x, ours, atol=1e-4)


def test_exported_renoise_chain_gives_the_same_samples_in_diffusers(tmp_path):
    scheduler = diffusers.DDIMScheduler(prediction_type="epsilon", clip_sample=False, beta_schedule="scaled_linear",
                                        beta_start=0.00085, beta_end=0.012)
    sampler = FewStepSampler(from_diffusers(unet(), scheduler), grids.from_timesteps([999, 749, 499, 249]), "renoise")
    z, generator = torch.randn(2, 1, 8, 8), torch.Generator().manual_seed(1)
    with torch.no_grad():
        ours = sampler(z, noise=lambda x: torch.randn(x.shape, generator=generator))
    save_pretrained(sampler, tmp_path)
    theirs_scheduler = diffusers.LCMScheduler.from_pretrained(tmp_path / "scheduler")
    theirs_scheduler.set_timesteps(timesteps=json.loads((tmp_path / "timesteps.json").read_text()))
    x, generator = sampler.denoiser.process.prior(z), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for k in theirs_scheduler.timesteps:
            x = theirs_scheduler.step(sampler.denoiser.network.model(x, k).sample, k, x, generator).prev_sample
    assert torch.allclose(x, ours, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_adapted_or_exported_is_named(tmp_path):
    with pytest.raises(RoleError, match="alphas_cumprod"):
        from_diffusers(unet(), type("Other", (), {"config": {}})())
    scheduler = diffusers.DDIMScheduler()
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(RoleError, match="prediction_type"):
        from_diffusers(unet(), scheduler)
    uneven = FewStepSampler(from_diffusers(unet(), diffusers.DDIMScheduler()), (1.0, 0.9, 0.0))
    with pytest.raises(StoreError, match="trailing"):
        save_pretrained(uneven, tmp_path)
