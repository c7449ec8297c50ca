"""The user's own models by one string, and adapters that make any module fit a role."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from stillhouse.data.readers import PICKLES, parse_options
from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.diffusion.samplers import FewStepSampler
from stillhouse.errors import ConfigError, DamagedFileError, RoleError, UnknownNameError, require
from stillhouse.hub.architectures import TARGET, rebuild, refuse_words, remember
from stillhouse.hub.refusals import PICKLE, looks_foreign, read_json
from stillhouse.models import cells, convnets, flows, gnn, language, recurrent, stage_net, vit
from stillhouse.parts.ensembles import FILE as ENSEMBLE
from stillhouse.parts.ensembles import Ensemble
from stillhouse.parts.experts import FILE as EXPERTS
from stillhouse.parts.experts import Experts
from stillhouse.parts.nested import FILE as SLICE
from stillhouse.parts.nested import Slice
from stillhouse.parts.packed import LAYOUT as QUANTIZED
from stillhouse.parts.packed import QuantizedModel
from stillhouse.parts.surgeon import FILE as PRUNED
from stillhouse.parts.taps import taps
from stillhouse.protocols import CausalLM, Denoiser, Density, DualEncoder, Network, Seq2Seq, SpeechEncoder
from stillhouse.run.seeds import derive, preserved, reseed
from stillhouse.store import load_tree

SCHEMES = ("module:callable", "weights.safetensors (with --arch module:callable)", "a folder saved by Stillhouse (with "
           "--arch)", "zoo:NAME", "hf:NAME_OR_FOLDER", "diffusers:FOLDER", "an embedded network such as convnet",
           "timm:NAME", "torchvision:NAME", "cache:FOLDER", "api:BASE_URL:model=NAME,tokenizer=FOLDER")
WEIGHTS = ("model.safetensors", "weights.safetensors")

def _picture_flow(channels: int = 1, image_size: int = 8, **options: Any) -> nn.Module:
    return flows.picture_flow((channels, image_size, image_size), **options)


EMBEDDED: dict[str, Callable[..., nn.Module]] = {
    "convnet": convnets.ConvNet, "tiny-convnet": convnets.TinyConvNet, "resnet": convnets.SmallResNet,
    "vgg": convnets.SmallVGG, "alexnet": convnets.SmallAlexNet, "lenet": convnets.LeNet, "mlp": convnets.MLP,
    "conv-encoder": convnets.ConvEncoder, "vit": vit.SmallViT, "mixer": vit.SmallMixer, "gnn": gnn.GNN,
    "stage-net": stage_net.StageNet, "cell-net": cells.CellNet,
    "point-flow": flows.point_flow, "picture-flow": _picture_flow,
    "gpt2": language.gpt2, "opt": language.opt, "llama": language.llama,
    "lstm": recurrent.LSTMLanguageModel,
}
"""Embedded networks by name; they come with freshly drawn weights."""


def resolve_model(
    text: str | Path,
    kind: Any = None,
    *,
    arch: str | None = None,
    zoo: Mapping[str, Callable[..., nn.Module]] | None = None,
    seed: int = 0,
) -> Any:
    """The model that `text` names, checked for its role; for the role kind `Network` a factory of fresh ones.

    - `module:callable`, optionally with options: `my.models:resnet:width=32,classes=10`. The callable returns an
      nn.Module; the current folder is searched as well.
    - `weights.safetensors`, or a folder in which Stillhouse saved a target (the run's folder will do): weights for the
      network that `arch`, another `module:callable` or `hf:NAME`, builds.
    - `zoo:NAME`, optionally with options: a loader of the mapping `zoo`.
    - `hf:NAME_OR_FOLDER`: a model of `transformers`, by the role: a classifier or encoder of pictures or of texts, a
      causal language model, an encoder-decoder (T5, BART, Whisper), a speech encoder, a dual encoder (CLIP, SigLIP).
      `hf:NAME:num_labels=10` puts a new last layer on a classifier, `hf:NAME:fresh=true` draws new weights,
      `hf:NAME:pooling=first` takes a text's features from its first token instead of their mean.
    - `timm:NAME` or `torchvision:NAME`: a classifier or encoder of pictures, with the options `pretrained=false`,
      `num_classes=10` and `weights=FILE.safetensors`.
    - `pyg:GIN:in_channels=7,hidden_channels=16,num_layers=2,classes=2`: a graph network of torch_geometric (GCN, GIN,
      GraphSAGE, GAT), with the options `readout` and `weights=FILE.safetensors` beside those of its class.
    - `diffusers:FOLDER`: a network and its scheduler as a Denoiser.
    - `cache:FOLDER`: what `still cache` kept of a teacher, in its place. `api:BASE_URL:model=NAME,tokenizer=FOLDER`: a
      language model behind an endpoint (`stillhouse.hub.endpoint`), for roles that take a TopKTeacher.
    - An embedded network with fresh weights, optionally with options: `convnet:width=32,image_size=16` (`EMBEDDED`).
    - For a role kind with a `load` of its own, such as recorded trajectories: the folder that it was saved in.

    Weights are read from safetensors only and no code of a model's repository is run. Networks that a callable builds
    are a function of `text` and `seed`, so that a resumed run builds the same.

    Raises UnknownNameError (scheme, module, callable or zoo name), RoleError (no nn.Module, not what the role needs, a
    checkpoint that is a pickle), ConfigError (`arch` is missing or does not apply), DamagedFileError.
    """
    text = str(text)
    require(bool(text.strip()), f"no model was named; give {', '.join(SCHEMES)}", UnknownNameError)
    if hasattr(kind, "load") and Path(text).expanduser().is_dir():
        return kind.load(text)
    with preserved():
        reseed(derive("model", text, seed))
        if kind == Network:
            return _factory(text, zoo or {})
        return fit_role(_model(text, kind, arch, zoo or {}), kind, text)


def built(text: str, zoo: Mapping[str, Callable[..., nn.Module]] | None = None) -> nn.Module:
    """A network of Stillhouse by the words that a saved result names it with: an embedded one or one of the zoo, its
    options after a colon. Raises ConfigError for other words, which would run code."""
    name, _, options = text.partition(":")
    if name == "zoo":
        return _from_zoo(options, zoo or {})()
    if name not in EMBEDDED or (options and "=" not in options.partition(":")[0]):
        raise refuse_words(text)
    return _with_options(EMBEDDED[name], options, text)()


def _model(text: str, kind: Any, arch: str | None, zoo: Mapping[str, Callable[..., nn.Module]]) -> Any:
    scheme, _, rest = text.partition(":")
    path = Path(text).expanduser()
    if scheme in ("zoo", "hf", "diffusers", "timm", "torchvision", "cache", "api", "pyg") and rest:
        require(arch is None, f"arch says how to build a network for weights in a file; '{text}' brings its own")
        if scheme == "cache":
            from stillhouse.hub.cached import load_cached

            return load_cached(rest, kind)
        if scheme == "api":
            from stillhouse.hub.endpoint import load_endpoint

            return load_endpoint(rest, kind)
        if scheme == "zoo":
            return remember(_from_zoo(rest, zoo)(), text)
        if scheme == "diffusers":
            from stillhouse.hub.folders import denoiser_from

            return denoiser_from(rest)
        name, _, words = rest.partition(":")
        options = parse_options(words) if words else {}
        if scheme in ("timm", "torchvision"):
            from stillhouse.hub import vision

            return vision.load(scheme, name, kind, **options)
        if scheme == "pyg":
            return _graph_model(name, options)()
        if kind is SpeechEncoder:
            from stillhouse.hub import speech

            return speech.load(name, **options)
        if kind is DualEncoder:
            from stillhouse.hub.dual_encoders import load_dual

            return load_dual(name, **options)
        from stillhouse.hub.transformers import load

        return load(name, kind, **options)
    if path.suffix.lower() in PICKLES:
        raise RoleError(f"{path}: {PICKLE}")
    pruned = [p for p in (path, path / "target") if (p / PRUNED).is_file()]
    if pruned:
        from stillhouse.hub.speech import load_pruned

        return load_pruned(pruned[0])
    if path.suffix == ".safetensors" or path.is_dir():
        return _with_weights(_weights_file(path), arch, zoo)
    if path.exists():
        raise UnknownNameError(f"{path} is no model that can be read here; give {', '.join(SCHEMES)}")
    return _noted(_callable(text)(), text)


def _noted(made: Any, text: str) -> Any:
    return remember(made, text) if isinstance(made, nn.Module) else made


def _factory(text: str, zoo: Mapping[str, Callable[..., nn.Module]]) -> Callable[[], nn.Module]:
    """A factory of fresh networks: what `module:callable` or a configuration of `transformers` names."""
    scheme, _, rest = text.partition(":")
    if scheme == "hf" and rest:
        from stillhouse.hub.transformers import fresh

        name, _, options = rest.partition(":")
        make = fresh(name, **(parse_options(options) if options else {}))
    elif scheme in ("timm", "torchvision") and rest:
        from stillhouse.hub import vision

        name, _, options = rest.partition(":")
        make = vision.fresh(scheme, name, **(parse_options(options) if options else {}))
    elif scheme == "pyg" and rest:
        name, _, options = rest.partition(":")
        make = _graph_model(name, parse_options(options) if options else {})
    elif (scheme in ("zoo", "diffusers", "cache", "api") or Path(text).is_dir()
          or Path(text).suffix in (".safetensors", *PICKLES)):
        raise RoleError("this role needs a factory that gives a freshly initialised network at every call; "
                        f"'{text}' is one model with weights. Give module:callable")
    else:
        make = _callable(text)
    remember(make, text) if scheme not in ("hf", "timm", "torchvision", "pyg") else None
    first, second = fit_role(make(), None, text), fit_role(make(), None, text)
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    require(first is not second and not shared, f"'{text}' returns the same module, or the same weights, every time; a "
            "factory must build new ones at every call", RoleError)
    return make


def _graph_model(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    from stillhouse.hub import graphs

    try:
        inspect.signature(graphs.load).bind(name, **options)
    except TypeError as error:
        raise ConfigError(f"'pyg:{name}' cannot be built so: {error}") from error
    return lambda: graphs.load(name, **options)


def _from_zoo(text: str, zoo: Mapping[str, Callable[..., nn.Module]]) -> Callable[[], nn.Module]:
    name, _, options = text.partition(":")
    if name not in zoo:
        near = difflib.get_close_matches(name, zoo, n=1)
        hint = f"; did you mean 'zoo:{near[0]}'?" if near else ""
        raise UnknownNameError(f"there is no 'zoo:{name}'{hint} There is {', '.join(sorted(zoo)) or 'nothing'}")
    return _with_options(zoo[name], options, f"zoo:{text}")


def _callable(text: str) -> Callable[[], Any]:
    """What `module:callable[:options]` or an embedded `name[:options]` names, its options filled in."""
    module, _, rest = text.partition(":")
    if module in EMBEDDED and (not rest or "=" in rest.partition(":")[0]):
        return _with_options(EMBEDDED[module], rest, text)
    name, _, options = rest.partition(":")
    if not (name and all(part.isidentifier() for part in f"{module}.{name}".split("."))):
        near = difflib.get_close_matches(module, EMBEDDED, n=1)
        hint = f"did you mean '{near[0]}'? It" if near else "it"
        raise UnknownNameError(f"'{text}' names no model: there is no file or folder of that name (seen from "
                               f"{Path.cwd()}); {hint} is none of {', '.join(SCHEMES[:1] + SCHEMES[3:])} "
                               f"({', '.join(EMBEDDED)})")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        with preserved():
            found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise UnknownNameError(f"there is no module '{error.name}' (for '{text}'); it is looked for in {here} and "
                                   f"among what is installed. Other models: {', '.join(SCHEMES[1:])}") from error
        raise UnknownNameError(f"importing '{module}' (for '{text}') needs '{error.name}', which is not installed"
                               ) from error
    except Exception as error:
        raise RoleError(f"importing '{module}' (for '{text}') failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=3)
            raise UnknownNameError(f"'{module}' has no '{name}'" + (f"; near to it: {', '.join(near)}" if near else ""))
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        raise RoleError(f"'{text}' is a module, not a callable that builds one; give a function or class")
    require(callable(found), f"'{text}' is a {type(found).__name__}; give a callable that returns an nn.Module",
            RoleError)
    return _with_options(found, options, text)


def _with_options(make: Callable[..., Any], text: str, name: str) -> Callable[[], Any]:
    options = parse_options(text) if text else {}
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise ConfigError(f"'{name}' cannot be called so: {error}. Options are given as module:callable:name=value,…"
                          ) from error
    except ValueError:
        pass

    def build() -> Any:
        try:
            return make(**options)
        except Exception as error:
            raise RoleError(f"building '{name}' failed: {type(error).__name__}: {error}") from error

    return build


def _weights_file(path: Path) -> Path:
    """The weights meant by a path: a file, or the one in a folder or in its `target`."""
    if path.suffix == ".safetensors" and not path.is_dir():
        require(path.is_file(), f"there is no file {path} (seen from {Path.cwd()})", UnknownNameError)
        return path
    for folder in (path, path / "target"):
        for name in WEIGHTS:
            if (folder / name).is_file() and not (folder / "config.json").is_file():
                return folder / name
    looks_foreign(path)
    raise RoleError(f"the folder {path} holds no {' or '.join(WEIGHTS)}, here or in target/; is it a run that was not "
                    "finished, or whose result is no model?")


def _with_weights(path: Path, arch: str | None, zoo: Mapping[str, Callable[..., nn.Module]]) -> Any:
    build = builder(path.parent, arch, zoo)
    if (path.parent / "sampler.json").is_file():
        made: Any = build()
        return FewStepSampler.load(path.parent, made.network if isinstance(made, NetworkDenoiser) else made).denoiser
    if (path.parent / ENSEMBLE).is_file():
        return Ensemble.load(path.parent, build)
    if (path.parent / QUANTIZED).is_file():
        return QuantizedModel.load(path.parent, build()).model
    if (path.parent / EXPERTS).is_file():
        return Experts.load(path.parent, build())
    if (path.parent / SLICE).is_file():
        return Slice.load(path.parent, build())
    return load_weights(build(), path)


def builder(folder: Path, arch: str | None = None,
            zoo: Mapping[str, Callable[..., nn.Module]] | None = None) -> Callable[[], nn.Module]:
    """What builds the network for the weights in `folder`: `arch`, or what target.json beside them says.

    Raises ConfigError where neither does, or where target.json names code of the user's own.
    """
    if arch is not None:
        make = _factory(arch, {})
        return lambda: _noted(make(), arch)
    network = read_json(folder / TARGET).get("network") if (folder / TARGET).is_file() else None
    if network is None:
        raise ConfigError(f"{folder} holds weights, not the network they belong to; say how to build it with --arch "
                          "module:callable")
    return lambda: rebuild(network, lambda text: _noted(built(text, zoo), text))


def load_weights(model: nn.Module, path: Path | str) -> nn.Module:
    """Put the weights of a .safetensors file (any, or one of Stillhouse's) into `model`.

    Raises RoleError naming what does not fit, DamagedFileError for a file that is none or holds values that are not
    finite.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            ours = "tree" in (file.metadata() or {})
        state = load_tree(path) if ours else load_file(path)
    except (SafetensorError, OSError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(f"{path} is damaged or no .safetensors file: {error}") from error
    tensors = isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())
    require(tensors, f"{path} does not hold the weights of one network", RoleError)
    own = model.state_dict()
    tied = {k for k in own if any(k != o and own[k].data_ptr() == own[o].data_ptr() and own[k].numel() for o in state
                                  if o in own)}
    missing, extra = [k for k in own if k not in state and k not in tied], [k for k in state if k not in own]
    wrong = [f"{k}: {tuple(v.shape)} in the file, {tuple(own[k].shape)} in the network" for k, v in state.items()
             if k in own and own[k].shape != v.shape]
    if missing or extra or wrong:
        said = [f"missing {', '.join(missing[:3])}"] * bool(missing) + [f"unknown {', '.join(extra[:3])}"] * bool(extra)
        raise RoleError(f"the weights in {path} are not those of {type(model).__name__}: {'; '.join(said + wrong[:3])}"
                        ". Give the arch, with the options, that they were saved from")
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    require(not bad, f"{path} holds weights that are not finite, e.g. '{(bad or [''])[0]}'", DamagedFileError)
    model.load_state_dict(state, strict=False)
    return model


# ---------------------------------------------------------------------------------- roles


def fit_role(model: Any, kind: Any, name: str) -> Any:
    """`model`, adapted to the role kind where it is a known class of another library. Raises RoleError if it is no
    nn.Module or lacks what the role needs."""
    if isinstance(model, type) or not isinstance(model, nn.Module):
        raise RoleError(f"'{name}' gives a {type(model).__name__}, not an nn.Module"
                        + (f"; call it, or give {name}:options" if isinstance(model, type) else ""))
    if kind is Denoiser and not hasattr(model, "process"):
        raise RoleError(f"'{name}' ({type(model).__name__}) is no Denoiser: it has no `process` that says how pictures "
                        "are noised. Wrap it in stillhouse.diffusion.denoise.NetworkDenoiser, or give diffusers:FOLDER")
    if kind is DualEncoder and not (hasattr(model, "encode_image") and hasattr(model, "encode_text")):
        raise RoleError(f"'{name}' ({type(model).__name__}) is no dual encoder: it has no encode_image and encode_text."
                        " Give hf:FOLDER, or wrap a CLIPModel with its tokenizer in "
                        "stillhouse.hub.dual_encoders.adapt_dual")
    if kind is Density and not (hasattr(model, "log_prob") and hasattr(model, "sample")):
        raise RoleError(f"'{name}' ({type(model).__name__}) is no density: it has no log_prob and sample. Give one, "
                        "e.g. stillhouse.models.flows:picture_flow, or wrap a flow in its FlowDensity")
    if kind is CausalLM and not (hasattr(model, "generate") or hasattr(model, "top_k")):
        raise RoleError(f"'{name}' ({type(model).__name__}) is no causal language model: it has no `generate`")
    if kind is Seq2Seq and not hasattr(model, "generate"):
        raise RoleError(f"'{name}' ({type(model).__name__}) is no encoder-decoder that writes text: it has no "
                        "`generate`")
    if kind is Seq2Seq and getattr(model, "main_input_name", "") == "input_features":
        raise RoleError(f"'{name}' ({type(model).__name__}) reads spectrograms; wrap it with the settings of its "
                        "feature extractor in stillhouse.hub.seq2seq.SpeechToText, or give hf:FOLDER")
    if getattr(kind, "__name__", "") in ("TextClassifier", "TextEncoder") and _of_transformers(model):
        from stillhouse.hub.text import wrap_text

        return wrap_text(model, kind, name)
    if getattr(kind, "__name__", "") in ("Classifier", "Encoder"):
        require(not hasattr(model, "process"), f"'{name}' ({type(model).__name__}) is a Denoiser; this role needs "
                f"{'class logits' if kind.__name__ == 'Classifier' else 'features'} of pictures", RoleError)
        if _of_transformers(model):
            from stillhouse.hub.transformers import wrap

            return wrap(model, kind, name)
    return model


def _of_transformers(model: nn.Module) -> bool:
    return "transformers" in {c.__module__.partition(".")[0] for c in type(model).__mro__}


class Adapted(nn.Module):
    """A module whose output is turned into what a role needs; see `adapt`."""

    def __init__(self, module: nn.Module, logits: Callable[[Any], Tensor], encode: str | Callable[..., Tensor] | None):
        super().__init__()
        self.module = module
        self._logits, self._encode = logits, encode

    def forward(self, image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._logits(self.module(image, *args, **kwargs))

    def encode(self, image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One feature vector per picture, or per text where `image` are its token ids."""
        if self._encode is None:
            raise RoleError("this model was adapted without encode=…; name the inner module whose output is its "
                            "feature")
        if callable(self._encode):
            return self._encode(self.module, image, *args, **kwargs)
        with taps(self.module, [self._encode]) as features:
            self.module(image, *args, **kwargs)
            value = features[self._encode]
        return value.mean((2, 3)) if value.dim() == 4 else value[:, 0] if value.dim() == 3 else value


def adapt(
    module: nn.Module,
    logits: str | int | Callable[[Any], Tensor] | None = None,
    encode: str | Callable[..., Tensor] | None = None,
) -> Adapted:
    """Make `module` a Classifier, and an Encoder by `.encode`, without changing it; its parameters are shared.
    A module that takes (input_ids, attention_mask) becomes a TextClassifier and a TextEncoder in the same way.

    `logits` takes them out of what the module returns: an attribute or key ("logits"), a position, or a function of the
    output; None where it returns them. `encode` is the path of the inner module whose output is the feature (of maps
    [batch, channels, height, width] the mean, of tokens the first), or a function of the module and what it is given.
    Raises RoleError for what is no nn.Module or a path it does not have.
    """
    require(isinstance(module, nn.Module), f"adapt takes an nn.Module, not a {type(module).__name__}", RoleError)
    if isinstance(encode, str):
        require(encode in dict(module.named_modules()), f"{type(module).__name__} has no inner module '{encode}'; it "
                f"has {', '.join(list(dict(module.named_modules()))[1:8])}, …", RoleError)

    def take(output: Any) -> Tensor:
        if logits is None:
            return output
        if callable(logits):
            return logits(output)
        if isinstance(logits, str) and hasattr(output, logits):
            return getattr(output, logits)
        try:
            return output[logits]
        except (KeyError, IndexError, TypeError) as error:
            raise RoleError(f"{type(module).__name__} returns a {type(output).__name__} without '{logits}'") from error

    return Adapted(module, take, encode)
