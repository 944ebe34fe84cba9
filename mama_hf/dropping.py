"""
`granularity="layer"`: whole decoder layers leave the model, by block influence (Men et al. 2024, arXiv 2403.03853).

A layer's influence is 1 - cos(h_in, h_out), the mean over all tokens of the dense model. The layers of least influence
go, all at once, and the config is edited, so that what is left is a stock model.

Shapes: B = sequences, T = tokens (without padding), D = hidden size.
"""

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from . import blocks as walk
from .calibration import Batch
from .config import MamaPruningConfig
from .groups import num_kept
from .report import OneShotReport
from .targets import matches


# fields of a config with one entry a layer
_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")


@torch.no_grad()
def block_influence(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    device: str | torch.device | None = None,
    progress: bool = False,
) -> list[float]:
    """1 - cos(h_in, h_out) of each layer, the mean over the tokens of `batches`; each layer works on `device`."""
    _, blocks = walk.find_blocks(model)
    states, calls = walk.capture(model, blocks, batches)
    tokens = [batch["attention_mask"].flatten().bool() for batch in batches]
    influence = []
    for index, block in enumerate(tqdm(blocks, "layers", disable=not progress)):
        home = next(block.parameters()).device
        there = home if device is None else torch.device(device)
        block.to(there)
        total = 0.0
        for batch, state in enumerate(states):
            before = state.to(there)
            after = walk.run(block, before, walk.to_device(calls[batch][index], there))
            rows, moved = walk.flatten(before, tokens[batch]), walk.flatten(after, tokens[batch])
            total += float((1 - cosine_similarity(rows, moved, dim=-1)).double().sum())
            states[batch] = after.to(state.device)
        block.to(home)
        influence.append(total / sum(int(valid.sum()) for valid in tokens))
    return influence


def drop_layers(
    model: PreTrainedModel,
    recipe: MamaPruningConfig,
    batches: Sequence[Batch],
    device: str | torch.device | None = None,
    progress: bool = False,
) -> OneShotReport:
    """
    Remove the layers of least influence from `model`, in place. The arguments are those of [`prune_model`].

    Raises:
        `ValueError`: if too many layers are excluded, or the native class does not load what would be left.
    """
    start = time.perf_counter()
    name, blocks = walk.find_blocks(model)
    number = len(blocks) - num_kept(len(blocks), float(recipe.final_sparsity))  # type: ignore[arg-type]
    excluded = recipe.exclude_modules
    free = [index for index in range(len(blocks)) if excluded is None or not matches(f"{name}.{index}", excluded)]
    if number > len(free):
        raise ValueError(
            f"final_sparsity={recipe.final_sparsity} drops {number} layers, but exclude_modules={excluded!r} leaves "
            f"{len(free)} of {len(blocks)}. Lower the first or exclude fewer."
        )
    influence = block_influence(model, batches, device, progress)
    dropped = sorted(sorted(free, key=lambda index: influence[index])[:number])
    kept = [index for index in range(len(blocks)) if index not in dropped]
    _keep(model, name, blocks, kept)
    seconds = (time.perf_counter() - start) / len(influence)
    rows = {
        f"{name}.{index}": {
            "zeros": int(index in dropped),
            "parameters": 1,
            "sparsity": float(index in dropped),
            "error_before": value,
            "error": value,
            "seconds": seconds,
        }
        for index, value in enumerate(influence)
    }
    return OneShotReport(recipe=recipe.to_dict(), layers=rows)


def _keep(model: PreTrainedModel, name: str, blocks: nn.ModuleList, kept: list[int]) -> None:
    """Leave the layers `kept` in the model, after a look at what the native class makes of the edited config."""
    config = copy.deepcopy(model.config)
    for field in _PER_LAYER:
        values = vars(config).get(field)
        if values is not None:
            setattr(config, field, [values[index] for index in kept])
    config.num_hidden_layers = len(kept)
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, nn.ModuleList(blocks[index] for index in kept))
    with torch.device("meta"):
        native = type(model)(copy.deepcopy(config))
    if _shapes(native) != _shapes(model):
        setattr(model.get_submodule(parent), key, blocks)
        raise ValueError(
            f"{type(model).__name__} with the layers {kept} is not what its class makes of such a config: some layers "
            "have a part of their own. Exclude those (exclude_modules), or prune neurons."
        )
    for place, index in enumerate(kept):
        for module in blocks[index].modules():
            for field in ("layer_idx", "layer_id"):  # where the key-value cache keeps a layer's part
                if vars(module).get(field) == index:
                    setattr(module, field, place)
    _adopt(model, config)


def _adopt(model: PreTrainedModel, config: Any) -> None:
    """Take over the fields: the config object is shared by the model's modules."""
    for field in (*_PER_LAYER, "num_hidden_layers"):
        if field == "num_hidden_layers" or field in vars(config):
            setattr(model.config, field, getattr(config, field))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}
