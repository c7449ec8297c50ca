"""A smaller student of its teacher's own architecture."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from stillhouse.data.readers import parse_options
from stillhouse.errors import ConfigError, RoleError, UnknownNameError, require
from stillhouse.hub.text import TextModel
from stillhouse.hub.transformers import ImageModel
from stillhouse.run.seeds import derive, preserved, reseed

MODELS = {"vit": "ViT", "resnet": "ResNet", "bert": "BERT", "llama": "Llama", "gpt2": "GPT-2", "qwen2": "Qwen2",
          "qwen3": "Qwen3"}
"""What can be made smaller: the model types of transformers, with any head."""


def smaller(teacher: Any, fraction: float = 0.5, layers: int | None = None, width: int | None = None,
            inherit: bool = True) -> Any:
    """A student of the teacher's architecture with fewer layers: `layers` of them, or the `fraction` of the teacher's.

    It inherits all weights but those of the layers left out; the layers kept are evenly spaced, the first and the last
    among them (DistilBERT, arXiv 1910.01108). With another `width` (of the hidden states; of a ResNet, of the last
    stage), in proportion to which heads and inner layers shrink, or without `inherit`, its weights are freshly drawn.
    Of a ResNet every stage keeps the `fraction` of its blocks, at least one. The teacher is left as it is.

    Takes models of transformers of the kinds in `MODELS`, as they are or as ImageModel or TextModel, and returns the
    same class. Raises RoleError for others, ConfigError for a size that is impossible or no smaller.
    """
    inner = teacher.model if isinstance(teacher, ImageModel | TextModel) else teacher
    kind = getattr(getattr(inner, "config", None), "model_type", None)
    require(kind in MODELS and hasattr(inner, "base_model_prefix"), f"{type(inner).__name__} cannot be made smaller by "
            f"itself; that is known of {', '.join(MODELS.values())} of transformers. Name another student", RoleError)
    require(0 < fraction <= 1, f"fraction is the part of the layers to keep, in (0, 1], not {fraction}")
    for name, value in (("layers", layers), ("width", width)):
        require(value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1),
                f"{name} is a whole number of at least 1, not {value}")
    config = copy.deepcopy(inner.config)
    kept = _blocks(config, inner, fraction, layers) if kind == "resnet" else _layers(config, inner, fraction, layers)
    narrower = width is not None and _narrow(config, width)
    require(narrower or any(len(k) < n for k, n in kept.values()), "a student with all layers and the full width is "
            "not smaller; give fraction, layers or width")
    if isinstance(teacher, ImageModel | TextModel):
        said = {**teacher.spec(), "config": config.to_dict()}
        student: Any = type(teacher).from_spec(said)
        new = student.model
    else:
        student = new = type(inner)(config)
    new.to(next(inner.parameters()).dtype)
    if getattr(inner, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(inner.generation_config)
    if inherit and not narrower:
        given = inner.state_dict()
        places = {path: indices for path, (indices, _) in kept.items()}
        new.load_state_dict({key: given[_origin(key, places)] for key in new.state_dict()})
    return student.to(next(inner.parameters()).device).train(teacher.training)


def by_words(text: str, teacher: Any, seed: int = 0) -> nn.Module:
    """`smaller`, `smaller:layers=3`, `smaller:fraction=0.25,inherit=false` of `teacher`, a function of text and seed.

    Raises UnknownNameError for an option that there is not.
    """
    _, _, words = text.partition(":")
    options = parse_options(words) if words else {}
    known = ("fraction", "layers", "width", "inherit")
    unknown = set(options) - set(known)
    require(not unknown, f"smaller has no option '{min(unknown, default='')}'; it has {', '.join(known)}",
            UnknownNameError)
    require(isinstance(options.get("inherit", True), bool), f"inherit is true or false, not '{options.get('inherit')}'")
    fraction = options.get("fraction", 0.5)
    require(isinstance(fraction, int | float) and not isinstance(fraction, bool), f"fraction is a number, not "
            f"'{fraction}'")
    with preserved():
        reseed(derive("model", text, seed))
        return smaller(teacher, **options)


Kept = dict[str, tuple[list[int], int]]
"""By the path of a list of layers: which are kept, and how many there are."""


def _spaced(total: int, count: int) -> list[int]:
    return [round(x) for x in torch.linspace(0, total - 1, count).tolist()]


def _part(total: int, fraction: float) -> int:
    return max(1, math.floor(total * fraction + 0.5))


def _layers(config: Any, inner: nn.Module, fraction: float, layers: int | None) -> Kept:
    """The layers kept of a transformer; `config` is told of them."""
    total = int(config.num_hidden_layers)
    count = layers or _part(total, fraction)
    require(count <= total, f"the teacher has {total} layers; {count} are more")
    kept = _spaced(total, count)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    path = next(path for path, module in inner.named_modules()
                if isinstance(module, nn.ModuleList) and len(module) == total)
    return {path: (kept, total)}


def _blocks(config: Any, inner: nn.Module, fraction: float, layers: int | None) -> Kept:
    """The blocks kept of each stage of a ResNet; `config` is told of them."""
    require(layers is None, "the layers of a ResNet stand in stages; give fraction, which each of them keeps")
    depths = [int(depth) for depth in config.depths]
    config.depths = [_part(depth, fraction) for depth in depths]
    path = next(path for path, module in inner.named_modules()
                if isinstance(module, nn.ModuleList) and len(module) == len(depths))
    return {f"{path}.{i}.layers": (_spaced(depth, count), depth)
            for i, (depth, count) in enumerate(zip(depths, config.depths, strict=True))}


def _narrow(config: Any, width: int) -> bool:
    """Bring `config` to `width`; whether that is narrower."""
    stages = getattr(config, "hidden_sizes", None)
    full = int(stages[-1] if stages else config.hidden_size)
    fixed = [config.embedding_size, *stages] if stages else [
        n for n in (config.num_attention_heads, getattr(config, "num_key_value_heads", None)) if n]
    unit = full // math.gcd(full, *fixed)
    require(width <= full and width % unit == 0, f"width must be a multiple of {unit} up to {full}, so that "
            f"{'the width of each stage' if stages else 'the number of heads'} stays whole; got {width}", ConfigError)
    if stages:
        require(config.layer_type != "bottleneck" or min(stages) * width // full >= 4, f"at width {width} a stage of "
                "this ResNet would be narrower than the 4 channels that its bottlenecks need")
        config.embedding_size = config.embedding_size * width // full
        config.hidden_sizes = [size * width // full for size in stages]
        return width < full
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "n_inner"):
        value = getattr(config, name, None)
        if value:
            setattr(config, name, max(1, value * width // full))
    config.hidden_size = width
    return width < full


def _origin(key: str, kept: dict[str, list[int]]) -> str:
    """The teacher's name of a student's tensor."""
    for path, indices in kept.items():
        if key.startswith(f"{path}."):
            number, _, rest = key.removeprefix(f"{path}.").partition(".")
            return f"{path}.{indices[int(number)]}.{rest}"
    return key
