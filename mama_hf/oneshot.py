"""`prune_model`: layer-by-layer pruning of a trained model on calibration data, without training.

The model is taken block by block. With `move_values="least_squares"` two streams of hidden states run side by side,
one through the dense blocks and one through the pruned ones, and a weight aims at what makes the two meet: query, key,
value, gate and up projections at the dense model's outputs, given the pruned model's inputs; the projections that
write to the residual stream at the dense hidden state minus the current residual stream. So every block repairs the
error that has built up before it. The other rules see only the pruned stream, as they were published.

Shapes: B = sequences, T = tokens (without padding), I = in, O = out, D = hidden size.
"""

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from . import blocks as walk
from .calibration import check_calibration
from .checkpoint import describe, save_recipe_with
from .config import MamaPruningConfig
from .dropping import drop_layers
from .engine import Engine
from .report import OneShotReport
from .resume import Progress
from .rules import DEFAULT_ITERATIONS
from .structured import StructuredRule
from .targets import LoraTarget, Target, add_biases, find_targets


logger = logging.getLogger(__name__)

_GRADIENT_CRITERIA = ("movement", "displacement", "taylor", "fisher")


def prune_model(
    model: PreTrainedModel,
    recipe: MamaPruningConfig,
    calibration: Iterable[Any],
    *,
    device: str | torch.device | None = None,
    iterations: int | None = None,
    resume_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> OneShotReport:
    """
    Prune a model in one shot, in place: no training, only forward passes over the calibration data.

    `criterion="mama", move_values="least_squares"` chooses mask and values together and is by far the best;
    `criterion="mama"` with another `move_values` scores like `"wanda"`, as there are no gradients to measure movement
    by. The schedule's fields of the recipe play no part.

    With `granularity="neuron"`, `"head"` or `"neuron+head"` whole groups become zero; with `"layer"` the layers whose
    output is most like their input leave the model, which stays one of its native class.

    Args:
        model (`PreTrainedModel`): a causal LM (or encoder) whose layers are one `nn.ModuleList`. Only weights inside
            those layers are pruned. Their original values are kept in host memory until the call ends.
        recipe (`MamaPruningConfig`): what to prune, and how.
        calibration (`Iterable`):
            batches: dicts with `input_ids` [B, T] and `attention_mask`, or id tensors; padding does not count. See
            [`calibration_windows`]. It should have several tokens for each input of the widest layer.
        device (`str` or `torch.device`, *optional*):
            where each block is worked on; it goes back afterwards. `None`: where the model is.
        iterations (`int`, *optional*, defaults to 14):
            quality against time: solver steps with `move_values="least_squares"`, where entries go.
        resume_dir (`str`, *optional*):
            folder for finished blocks. A run that was stopped continues from there, given the same dense model, recipe
            and calibration, and ends with the same weights bit for bit. It can be deleted after the call.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        [`OneShotReport`]: sparsity, relative output errors and seconds per weight.

    Raises:
        `ValueError`: for a recipe, calibration or model that can't work, and for NaN activations. The model is then as
        it was.
    """
    _check_recipe(recipe)
    _check_use(recipe, iterations=iterations, resume_dir=resume_dir)
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations={iterations!r} must be at least 1, or None for {DEFAULT_ITERATIONS}.")
    embeddings: Any = model.get_input_embeddings()
    batches = check_calibration(calibration, embeddings.num_embeddings)
    if recipe.granularity == "layer":
        with walk.inference_mode_of(model):
            report = drop_layers(model, recipe, batches, device, progress)
        return _finish(model, recipe, report)
    structured = StructuredRule(model, recipe) if recipe.is_structured else None
    targets = _block_targets(model, recipe) if structured is None else structured.targets
    engine = Engine(model, recipe, batches, targets, device, iterations or DEFAULT_ITERATIONS, structured)
    engine.warn_of_few_tokens()
    changed = targets if structured is None else structured.changed
    saved = Progress(resume_dir, model, recipe, batches, changed, engine.iterations)
    with walk.inference_mode_of(model):
        try:
            if recipe.move_values == "bias":
                engine.undo.append(add_biases(model, targets))
            report = engine.prune(saved, progress)
        except BaseException:
            engine.restore()
            raise
    return _finish(model, recipe, report)


def _finish(model: PreTrainedModel, recipe: MamaPruningConfig, report: OneShotReport) -> OneShotReport:
    save_recipe_with(model)
    describe(model, recipe, report.sparsity)
    return report


def _block_targets(model: PreTrainedModel, recipe: MamaPruningConfig) -> list[Target]:
    """The recipe's targets inside the model's blocks, each a weight whose input can be seen."""
    name, blocks = walk.find_blocks(model)
    inside = set(blocks.modules())
    targets = []
    for target in find_targets(model, recipe, trainable_only=False):
        if target.module not in inside:
            logger.warning("%s is not pruned: it is outside the layers of %s.", target.name, name)
        elif isinstance(target, LoraTarget):
            raise ValueError(f"{target.name} is inside a LoRA layer: merge the adapter (merge_and_unload) first.")
        elif not target.has_input:
            raise ValueError(f"{target.name} holds all experts of a layer, whose inputs are not visible. Exclude it.")
        else:
            targets.append(target)
    if not targets:
        raise ValueError(f"None of the recipe's targets is inside the layers of {name}.")
    return targets


def _check_use(recipe: MamaPruningConfig, **given: Any) -> None:
    """Refuse arguments that would do nothing."""
    useless = {
        "iterations": (recipe.is_structured, "which is solved exactly"),
        "resume_dir": (recipe.granularity == "layer", "which takes one pass over the data"),
    }
    for name, (asked, reason) in useless.items():
        if asked and given[name] is not None:
            raise ValueError(
                f"{name}={given[name]!r} has no use with granularity={recipe.granularity!r}, {reason}. Leave it out."
            )


def _check_recipe(recipe: MamaPruningConfig) -> None:
    if not isinstance(recipe, MamaPruningConfig):
        raise TypeError(f"recipe must be a MamaPruningConfig, not {type(recipe).__name__}.")
    refused = {
        "criterion": (recipe.criterion in _GRADIENT_CRITERIA, '"mama", "wanda", "sparsegpt", "magnitude" or "random"'),
        "scope": (
            recipe.scope == "global" and not recipe.is_structured,
            '"layer", "row" or None (allocation="owl" lets layers differ)',
        ),
        "regrowth": (recipe.regrowth != 0, "0.0"),
        "distillation_weight": (recipe.distillation_weight != 0, "0.0"),
        "final_sparsity": (recipe.final_sparsity == "auto", "a number, and reward_tolerance=None"),
        "reward_tolerance": (recipe.reward_tolerance is not None, "None"),
    }
    for name, (asked, instead) in refused.items():
        if asked:
            raise ValueError(
                f"{name}={getattr(recipe, name)!r} needs training, and prune_model does none; set {name}={instead}, "
                "or train with MamaPruningCallback."
            )
