"""Small transformers and mixers for pictures. They have `features(image)`, `feature_dim` and `forward(image)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import require


class PatchEmbed(nn.Module):
    """Non-overlapping patches of a picture as tokens, row by row."""

    def __init__(self, channels_in: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels_in, width, patch, patch)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens width"]:
        return self.proj(image).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        require(width % heads == 0, f"the width must be a multiple of the number of heads; got {width} and {heads}")
        self.heads, self.head_width = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, hidden)

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MixerBlock(nn.Module):
    """x + a perceptron over the tokens, then x + a perceptron over the channels (MLP-Mixer)."""

    def __init__(self, width: int, tokens: int, hidden_tokens: int, hidden: int):
        super().__init__()
        self.norm1, self.mlp_tokens = nn.LayerNorm(width), Mlp(tokens, hidden_tokens)
        self.norm2, self.mlp_channels = nn.LayerNorm(width), Mlp(width, hidden)

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class SmallViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) with the module names of timm.

    `tokens(image)` gives all tokens after the last norm, the class token first; `num_prefix_tokens` is 1 with a class
    token and 0 without, where the features are the mean of the tokens. With `classes` 0 it has no head and returns
    its features.
    """

    def __init__(self, channels_in: int = 1, classes: int = 10, image_size: int = 16, patch: int = 4, width: int = 32,
                 depth: int = 4, heads: int = 4, mlp_ratio: float = 2.0, class_token: bool = True):
        super().__init__()
        require(image_size % patch == 0, f"patches of {patch} do not tile pictures of {image_size} pixels")
        require(depth >= 1, f"depth must be at least 1, not {depth}")
        self.feature_dim, self.classes, self.num_prefix_tokens = width, classes, int(class_token)
        self.patch_embed = PatchEmbed(channels_in, width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2 + int(class_token), width))
        self.blocks = nn.Sequential(*(Block(width, heads, int(mlp_ratio * width)) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes) if classes else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def tokens(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens features"]:
        x = self.patch_embed(image)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.norm(self.blocks(x + self.pos_embed))

    def features(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        x = self.tokens(image)
        return x[:, 0] if self.cls_token is not None else x.mean(1)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.features(image))


class SmallMixer(nn.Module):
    """An MLP-Mixer (Tolstikhin et al. 2021) with the module names of timm; the features are the mean of the tokens."""

    num_prefix_tokens = 0

    def __init__(self, channels_in: int = 1, classes: int = 10, image_size: int = 16, patch: int = 4, width: int = 32,
                 depth: int = 4, hidden_tokens: int = 16, hidden: int = 64):
        super().__init__()
        require(image_size % patch == 0, f"patches of {patch} do not tile pictures of {image_size} pixels")
        require(depth >= 1, f"depth must be at least 1, not {depth}")
        self.feature_dim, self.classes = width, classes
        self.stem = PatchEmbed(channels_in, width, patch)
        tokens = (image_size // patch) ** 2
        self.blocks = nn.Sequential(*(MixerBlock(width, tokens, hidden_tokens, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def features(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        return self.norm(self.blocks(self.stem(image))).mean(1)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.features(image))
