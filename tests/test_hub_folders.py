"""Weights of diffusers folders that do not belong to their configuration."""

import pytest

diffusers = pytest.importorskip("diffusers")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from stillhouse.errors import DamagedFileError  # noqa: E402
from stillhouse.hub.models import resolve_model  # noqa: E402
from stillhouse.protocols import Denoiser  # noqa: E402


def test_weights_that_lack_something_or_do_not_fit_are_refused(tmp_path):
    diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2).save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    assert torch.isfinite(resolve_model(f"diffusers:{tmp_path}", Denoiser).network.model.conv_in.bias).all()
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if k != "conv_in.bias"}, file)
    with pytest.raises(DamagedFileError, match=r"lack 1 .*conv_in\.bias"):
        resolve_model(f"diffusers:{tmp_path}", Denoiser)
    save_file({**whole, "conv_in.bias": torch.zeros(3)}, file)
    with pytest.raises(DamagedFileError, match="conv_in"):
        resolve_model(f"diffusers:{tmp_path}", Denoiser)
