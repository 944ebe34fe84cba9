"""What is written beside the weights: the recipe, `config.mama`, and the pruner's state for resuming."""

import json
import os
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import MamaPruningConfig
from .pruner import Pruner
from .version import __version__


STATE_NAME = "pruning_state.safetensors"
STATE_VERSION = 1


def save_state(pruner: Pruner, directory: str | os.PathLike, step: int) -> None:
    """Write the pruner's state (masks as bits) into a checkpoint folder, under a temporary name first."""
    tensors, values = pruner.state_dict()
    packed = {
        key: pack_bits(value) if value.dtype == torch.bool else value.contiguous() for key, value in tensors.items()
    }
    header = {
        "version": STATE_VERSION,
        "step": step,
        "recipe": pruner.config.to_dict(),
        "values": values,
        "shapes": {key: list(value.shape) for key, value in tensors.items() if value.dtype == torch.bool},
    }
    path = Path(directory) / STATE_NAME
    temporary = path.with_name(f".{STATE_NAME}.{os.getpid()}.tmp")
    save_file(packed, temporary, metadata={"mama": json.dumps(header)})
    os.replace(temporary, path)


def load_state(pruner: Pruner, directory: str | os.PathLike, step: int) -> None:
    """
    Continue the pruner from a checkpoint folder.

    Raises:
        `ValueError`: if the file is missing, damaged, or of another step, recipe or model; says what to do.
    """
    path = Path(directory) / STATE_NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing, so pruning can't be resumed from there. {_advice(Path(directory))}")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["mama"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, TypeError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}). {_advice(Path(directory))}") from error
    _check_header(header, pruner, path, step)
    for key, shape in header["shapes"].items():
        tensors[key] = unpack_bits(tensors[key], shape)
    try:
        pruner.load_state_dict(tensors, header["values"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not fit this model ({error}). Resume with the model and the trainer class that wrote it."
        ) from error


def _check_header(header: dict[str, Any], pruner: Pruner, path: Path, step: int) -> None:
    if header["version"] != STATE_VERSION:
        raise ValueError(
            f"{path} has version {header['version']}; mama-hf {__version__} reads {STATE_VERSION}. Resume with the "
            "mama-hf version that wrote it."
        )
    saved, given = header["recipe"], pruner.config.to_dict()
    changed = [key for key in given if given[key] != saved.get(key)]
    if changed:
        differences = "; ".join(f"{key} was {saved.get(key)!r} and is {given[key]!r}" for key in changed)
        raise ValueError(
            f"{path} was written with another recipe: {differences}. Resume with the recipe in that folder "
            "(MamaPruningConfig.from_pretrained), or start a new run from its weights."
        )
    if header["step"] != step:
        raise ValueError(f"{path} is of step {header['step']}, but the trainer resumes at step {step}.")


def _advice(directory: Path) -> str:
    """What to do without this folder's state: the newest complete checkpoint beside it, if there is one."""
    complete = [
        (int(match[1]), folder)
        for folder in directory.parent.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and folder != directory
        if (folder / STATE_NAME).is_file()
    ]
    if complete:
        return f"The newest complete checkpoint beside it is {max(complete)[1]}: resume from that one."
    return (
        "If the folder was moved, pass MamaPruningCallback(recipe, resume_from=folder). To prune a checkpoint that "
        "was trained without pruning, load its model and start a new run."
    )


def pack_bits(mask: Tensor) -> Tensor:
    """Bool of any shape -> bits in uint8 [ceil(numel / 8)]."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack_bits(bits: Tensor, shape: list[int]) -> Tensor:
    """The inverse of `pack_bits`."""
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).view(shape)


def describe(model: nn.Module, config: MamaPruningConfig, sparsity: float) -> None:
    """Put the recipe, the sparsity reached and the package's version into `model.config.mama`."""
    for part in _savers(model):
        part.config.mama = {"recipe": config.to_dict(), "sparsity": sparsity, "version": __version__}


def save_recipe_with(model: nn.Module) -> None:
    """From now on `model.save_pretrained(dir)` writes `pruning_config.json` too, and so do trainer and Hub uploads."""
    for part in _savers(model):
        # a bound method, so that a copy of the model gets one bound to itself
        part.save_pretrained = types.MethodType(save_pretrained, part)


def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` of a pruned model. By the name of the method, so that a pickle of the model finds that."""
    result = type(self).save_pretrained(self, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        MamaPruningConfig.from_dict(self.config.mama["recipe"]).save_pretrained(save_directory)
    return result


def _savers(model: Any) -> list[Any]:
    """The model, and the one inside it if it is PEFT's wrapper: what `merge_and_unload` will return."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return [part for part in {id(model): model, id(inner): inner}.values() if _can_save(part)]


def _can_save(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) or hasattr(model, "get_base_model")
