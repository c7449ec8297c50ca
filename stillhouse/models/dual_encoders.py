"""Small dual encoders of pictures and texts from `transformers`, with freshly drawn weights. They need the extra `hf`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from stillhouse.errors import DataError, MissingExtraError, require

BOS, EOS, PAD, UNKNOWN = "<bos>", "<eos>", "<pad>", "<unknown>"


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("dual encoders need transformers: pip install 'stillhouse[hf]'") from error
    return transformers


def word_tokenizer(texts: Sequence[str], length: int = 16) -> Any:
    """A `transformers` tokenizer whose tokens are the lower-case words and marks of `texts`, with <bos> and <eos>."""
    hf = _library()
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    require(bool(words), "a vocabulary needs at least one word", DataError)
    vocabulary = {word: i for i, word in enumerate([PAD, BOS, UNKNOWN, *words, EOS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, vocabulary[BOS]), (EOS, vocabulary[EOS])])
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD,
                                      unk_token=UNKNOWN, model_max_length=length)


def clip(
    tokenizer: Any, features: int = 48, width: int = 48, layers: int = 4, heads: int = 4, patch: int = 8,
    image: int = 32, text_width: int = 48, text_layers: int = 2, length: int = 16,
) -> nn.Module:
    """A CLIP: a ViT over patches of `patch` pixels and a causal text transformer, both projected to `features`."""
    hf = _library()
    text = {"vocab_size": len(tokenizer), "hidden_size": text_width, "intermediate_size": 4 * text_width,
            "num_hidden_layers": text_layers, "num_attention_heads": heads, "max_position_embeddings": length,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
              "num_attention_heads": heads, "image_size": image, "patch_size": patch}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=features))


def siglip(
    tokenizer: Any, width: int = 48, layers: int = 4, heads: int = 4, patch: int = 8, image: int = 32,
    text_layers: int = 2, length: int = 16,
) -> nn.Module:
    """A SigLIP: pooled by attention, texts read in both directions, both encoders of one width."""
    hf = _library()
    common = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    text = {**common, "vocab_size": len(tokenizer), "num_hidden_layers": text_layers, "max_position_embeddings": length,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "projection_size": width}
    vision = {**common, "num_hidden_layers": layers, "image_size": image, "patch_size": patch}
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision))
