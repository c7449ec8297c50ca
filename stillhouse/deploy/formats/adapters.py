"""LoRA adapters of a target, for `peft`."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from stillhouse.deploy.formats.views import Job, Made, compare, view_of
from stillhouse.errors import MissingExtraError, RoleError


def to_peft(job: Job) -> Made:
    """Write the adapter alone, and compare the bare network with it put on again. Raises RoleError without one."""
    model = job.target.model if job.row == "QuantizedModel" else job.target
    if not has_adapters(model):
        raise RoleError(f"{type(model).__name__} carries no LoRA adapter of peft, so there is none to export; the "
                        "whole network is exported by --to hf, onnx or safetensors")
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise MissingExtraError("--to peft needs peft; install it with: pip install 'stillhouse[hf]'") from error
    holder: Any = next(m for m in model.modules() if hasattr(m, "peft_config"))
    if isinstance(holder, PeftModel):
        holder.save_pretrained(str(job.folder))
        bare = copy.deepcopy(holder).unload()
    else:
        from safetensors.torch import save_file

        weights = get_peft_model_state_dict(holder)
        save_file({f"base_model.model.{name}": value.detach().cpu().clone().contiguous()
                   for name, value in weights.items()}, job.folder / "adapter_model.safetensors", {"format": "pt"})
        holder.peft_config["default"].save_pretrained(str(job.folder))
        bare = stripped(copy.deepcopy(holder))
    (job.folder / "README.md").unlink(missing_ok=True)
    again: Any = PeftModel.from_pretrained(bare, str(job.folder)).eval()
    checks = compare(view_of(holder, job.row, job.about), view_of(_like(holder, again), job.row, job.about))
    code = ('from peft import LoraConfig, PeftModel\n\nconfig = LoraConfig.from_pretrained(".")\n'
            '# model = PeftModel.from_pretrained(the network that was adapted, ".")')
    note = "It is the adapter alone: it belongs to the weights of the network that was adapted."
    return Made(checks, 1e-5, code, (note,))


def has_adapters(model: nn.Module) -> bool:
    """Whether a module inside is a layer of peft."""
    return any(c.__module__.partition(".")[0] == "peft" for m in model.modules() for c in type(m).__mro__)


def merged(model: Any) -> Any:
    """A copy of the network with its adapters added to the weights."""
    model = copy.deepcopy(model)
    if hasattr(model, "merge_and_unload"):
        return model.merge_and_unload()
    for module in model.modules():
        if hasattr(module, "get_base_layer") and hasattr(module, "merge"):
            module.merge()
    return stripped(model)


def stripped(model: Any) -> Any:
    """The network without its adapters, in place."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False
    return model


def _like(holder: Any, again: Any) -> Any:
    return again if isinstance(holder, type(again)) else again.base_model.model
