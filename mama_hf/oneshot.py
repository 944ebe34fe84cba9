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
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from . import blocks as walk
from .allocation import outlier_ratio, owl_sparsities
from .calibration import Batch, check_calibration
from .checkpoint import describe, save_recipe_with
from .config import MamaPruningConfig
from .report import OneShotReport
from .resume import Progress
from .rules import DEFAULT_ITERATIONS, prune_layer
from .solvers import Inputs, Moments
from .targets import LoraTarget, Target, add_biases, find_targets, is_linear, writes_to_residual


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
            quality against time: solver steps with `move_values="least_squares"`.
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
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations={iterations!r} must be at least 1, or None for {DEFAULT_ITERATIONS}.")
    embeddings: Any = model.get_input_embeddings()
    batches = check_calibration(calibration, embeddings.num_embeddings)
    targets = _block_targets(model, recipe)
    engine = _Engine(model, recipe, batches, targets, device, iterations or DEFAULT_ITERATIONS)
    engine.warn_of_few_tokens()
    saved = Progress(resume_dir, model, recipe, batches, targets, engine.iterations)
    with walk.inference_mode_of(model):
        try:
            if recipe.move_values == "bias":
                engine.undo.append(add_biases(model, targets))
            report = engine.prune(saved, progress)
        except BaseException:
            engine.restore()
            raise
    save_recipe_with(model)
    describe(model, recipe, report.sparsity)
    return report


class _Engine:
    """The streams and the work on one block after another."""

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: MamaPruningConfig,
        batches: list[Batch],
        targets: list[Target],
        device: str | torch.device | None,
        iterations: int,
    ) -> None:
        self.model, self.recipe, self.batches, self.iterations = model, recipe, batches, iterations
        self.device = None if device is None else torch.device(device)
        self.name, self.blocks = walk.find_blocks(model)
        self.targets = {target.module: target for target in targets}
        self.order = {target.module: index for index, target in enumerate(targets)}
        self.tokens = [batch["attention_mask"].flatten().bool() for batch in batches]  # which rows of [B * T] count
        self.sparsities: list[float] = [float(recipe.final_sparsity)] * len(self.blocks)  # type: ignore[arg-type]
        self.original: list[tuple[nn.Parameter, Tensor]] = []
        self.undo: list[Callable[[], None]] = []
        self.rows: list[dict[str, Any]] = []
        self.dense: list[Tensor] = []
        self.pruned: list[Tensor] = []

    def warn_of_few_tokens(self) -> None:
        tokens = sum(int(valid.sum()) for valid in self.tokens)
        width = max(target.num_inputs for target in self.targets.values())
        if tokens < width:
            logger.warning(
                "The calibration has %d tokens, but the widest layer has %d inputs: their statistics are poor. Give "
                "several tokens for each input.",
                tokens,
                width,
            )

    def prune(self, saved: Progress, progress: bool) -> OneShotReport:
        hidden, self.calls = walk.capture(self.model, self.blocks, self.batches)
        first = saved.load(self._remember)
        if self.recipe.allocation == "owl":
            self.sparsities = saved.sparsities or self._allocate(hidden)
        self.dense, self.pruned = list(hidden), list(hidden)
        if first > 0:
            self.dense, self.pruned, self.rows = saved.dense or self.dense, saved.pruned, saved.rows
        two_streams = self.recipe.move_values == "least_squares"
        bar = tqdm(range(first, len(self.blocks)), "pruning", len(self.blocks), initial=first, disable=not progress)
        for index in bar:
            block = self.blocks[index]
            home = next(block.parameters()).device
            block.to(self.device or home)
            rows = self._prune_jointly(index) if two_streams else self._prune_apart(index)
            block.to(home)
            self.rows += rows
            bar.set_postfix_str(f"{self.name}.{index}, error {max((row['error'] for row in rows), default=0):.4f}")
            members = [target for module, target in self.targets.items() if module in set(block.modules())]
            saved.save(index, members, self.dense if two_streams else [], self.pruned, self.rows, self.sparsities)
        return OneShotReport(recipe=self.recipe.to_dict(), layers={row.pop("name"): row for row in self.rows})

    def _call(self, index: int, batch: int) -> walk.Call:
        call = self.calls[batch][index]
        return call if self.device is None else walk.to_device(call, self.device)

    def _device(self, index: int) -> torch.device:
        return next(self.blocks[index].parameters()).device

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor if self.device is None else tensor.to(self.device)

    def _flat(self, tensor: Tensor, batch: int) -> Tensor:
        """[B, T, n] or [B * T, n] -> the rows that are no padding, fp32."""
        return tensor.reshape(-1, tensor.shape[-1])[self.tokens[batch].to(tensor.device)].float()

    def _modules(self, index: int, writers: bool = False) -> dict[nn.Module, str]:
        """The linear modules of a block that are targets (or write to the residual stream), with their names."""
        prefix = f"{self.name}.{index}"
        return {
            module: f"{prefix}.{name}"
            for name, module in self.blocks[index].named_modules()
            if module in self.targets or (writers and is_linear(module) and writes_to_residual(name))
        }

    def _prune_apart(self, index: int) -> list[dict[str, Any]]:
        """One pass collects the inputs of all weights, a second one gives the next block its inputs."""
        block, modules = self.blocks[index], self._modules(index)
        groups: list[list[nn.Module]] = []
        inputs: list[Inputs] = []
        for batch, hidden in enumerate(self.pruned):
            _, records = walk.record(modules, block, self._here(hidden), self._call(index, batch))
            found = {entry.module: entry.input for entry in records}
            groups = groups or walk.group_by_input(records)
            inputs = inputs or [Inputs(self.targets[group[0]].num_inputs, self._device(index)) for group in groups]
            for group, moments in zip(groups, inputs):
                moments.add(self._flat(found[group[0]], batch))
        rows = []
        for group, moments in zip(groups, inputs):
            self._finish(moments, index)
            for module in group:
                start = time.perf_counter()
                weight = self._rows(module)
                rows.append(self._prune_one(module, index, moments, Moments.plain(weight, moments.gram), start))
        if index + 1 < len(self.blocks):
            for batch, hidden in enumerate(self.pruned):
                self.pruned[batch] = walk.run(block, self._here(hidden), self._call(index, batch)).to(hidden.device)
        return rows

    def _prune_jointly(self, index: int) -> list[dict[str, Any]]:
        """Input group by input group, each with the inputs that the pruned weights before it give."""
        modules = self._modules(index, writers=True)
        dense = _DensePass(self, index, modules)
        known: list[dict[nn.Module, Any]] = [{} for _ in self.batches]
        rows = []
        for group in dense.groups:
            reached = [
                walk.run_to(group[0], self.blocks[index], self._here(hidden), self._call(index, batch), known[batch])
                for batch, hidden in enumerate(self.pruned)
            ]
            if any(module in self.targets for module in group):
                rows += self._prune_group(group, index, dense, reached)
            for batch, x in enumerate(reached):
                for module in group:
                    output = known[batch][module] = module(x)
                    dense.advance(module, batch, output)
        if index + 1 < len(self.blocks):
            for batch, hidden in enumerate(self.pruned):
                output = walk.run(self.blocks[index], self._here(hidden), self._call(index, batch), known[batch])
                self.pruned[batch] = output.to(hidden.device)
        return rows

    def _prune_group(
        self, group: list[nn.Module], index: int, dense: "_DensePass", reached: list[Tensor]
    ) -> list[dict[str, Any]]:
        start = time.perf_counter()
        inputs = Inputs(reached[0].shape[-1], reached[0].device)
        across = torch.zeros_like(inputs.gram)  # dense inputs^T x pruned inputs
        shared = any(module not in dense.residual for module in group)
        flat = []
        for batch, x in enumerate(reached):
            flat.append(self._flat(x, batch))
            inputs.add(flat[-1])
            if shared:
                across.addmm_(dense.inputs[group[0]][batch].T, flat[-1])
        self._finish(inputs, index)
        rows = []
        for module in group:
            if module in self.targets:
                if module in dense.residual:
                    moments = dense.residual_moments(module, inputs, flat)
                else:
                    moments = Moments(inputs.gram, self._rows(module) @ across, dense.squares[module])
                rows.append(self._prune_one(module, index, inputs, moments, start))
                start = time.perf_counter()
        return rows

    def _finish(self, inputs: Inputs, index: int) -> None:
        try:
            inputs.finish()
        except ValueError as error:
            raise ValueError(f"{self.name}.{index}: {error}. The model is left as it was.") from error

    def _rows(self, module: nn.Module) -> Tensor:
        target = self.targets[module]
        return target.to_rows(target.weight).float()

    def _prune_one(
        self, module: nn.Module, index: int, inputs: Inputs, moments: Moments, start: float
    ) -> dict[str, Any]:
        target = self.targets[module]
        result = prune_layer(
            self.recipe,
            self._rows(module),
            target.parameter.dtype,
            inputs,
            moments,
            self.sparsities[index],
            self.iterations,
            self.order[module],
        )
        self._remember(target.parameter)
        target.parameter.data.copy_(target.from_rows(result.values))
        if result.bias is not None:
            bias: Any = module.bias
            self._remember(bias)
            bias.data += result.bias.to(bias.dtype)
        zeros = result.mask.numel() - int(result.mask.count_nonzero())
        return {
            "name": target.name,
            "zeros": zeros,
            "parameters": result.mask.numel(),
            "sparsity": zeros / result.mask.numel(),
            "error_before": result.error_before,
            "error": result.error_after,
            "seconds": time.perf_counter() - start,
        }

    def _remember(self, parameter: nn.Parameter) -> None:
        """Keep a parameter's value in host memory, for `restore`."""
        self.original.append((parameter, parameter.detach().cpu().clone()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back as it was before the call."""
        for parameter, value in reversed(self.original):
            parameter.data.copy_(value)
        for step in reversed(self.undo):
            step()

    def _allocate(self, hidden: list[Tensor]) -> list[float]:
        """OWL's sparsity of each block, from a pass over the dense model."""
        ratios = []
        streams = list(hidden)
        for index, block in enumerate(self.blocks):
            modules = self._modules(index)
            squares: dict[nn.Module, Tensor] = {}
            for batch, state in enumerate(streams):
                streams[batch], records = walk.record(modules, block, state, self.calls[batch][index])
                for entry in records:
                    square = self._flat(entry.input, batch).square().sum(dim=0)
                    squares[entry.module] = squares[entry.module] + square if entry.module in squares else square
            ratios.append(outlier_ratio(self._rows(module).abs() * x.sqrt() for module, x in squares.items()))
        return owl_sparsities(ratios, self.sparsities[0])


class _DensePass:
    """
    What the dense model does in one block, and how far the pruned stream is from it.

    Args:
        modules (`dict`): the block's targets and all that write to its residual stream.
    """

    def __init__(self, engine: _Engine, index: int, modules: dict[nn.Module, str]) -> None:
        self.engine = engine
        self.groups: list[list[nn.Module]] = []
        self.inputs: dict[nn.Module, list[Tensor]] = {}
        self.outputs: dict[nn.Module, list[Tensor]] = {}
        self.squares: dict[nn.Module, Tensor] = {}
        # dense minus pruned residual stream [T, D] of each batch, where the block adds its next output
        self.gap = [
            engine._flat(a, i) - engine._flat(b, i) for i, (a, b) in enumerate(zip(engine.dense, engine.pruned))
        ]
        self.residual = {module for module, name in modules.items() if writes_to_residual(name)}
        for batch, hidden in enumerate(engine.dense):
            here = engine._here(hidden)
            output, records = walk.record(modules, engine.blocks[index], here, engine._call(index, batch))
            self._take(records, batch, engine._flat(output, batch) - engine._flat(here, batch))
            engine.dense[batch] = output.to(hidden.device)

    def _take(self, records: list[walk.Record], batch: int, added: Tensor) -> None:
        self.groups = self.groups or walk.group_by_input(records)
        flat = {entry.module: self.engine._flat(entry.output, batch) for entry in records}
        if batch == 0 and not _adds_up([flat[module] for module in self.residual], added):
            self.residual = set()  # a norm or a factor stands between: aim at the dense outputs
        first = {group[0] for group in self.groups if not self.residual.issuperset(group)}
        for entry in records:
            if entry.module in first:
                self.inputs.setdefault(entry.module, []).append(self.engine._flat(entry.input, batch))
            if entry.module in self.residual:
                self.outputs.setdefault(entry.module, []).append(flat[entry.module])
                continue
            bias: Any = entry.module.bias
            square = (flat[entry.module] - (0 if bias is None else bias.float())).square().sum(dim=0)
            self.squares[entry.module] = self.squares.get(entry.module, 0) + square

    def residual_moments(self, module: nn.Module, inputs: Inputs, flat: list[Tensor]) -> Moments:
        """Target of a module that writes to the residual stream: its dense output plus the gap, without its bias."""
        bias: Any = module.bias
        num_out = self.gap[0].shape[1]
        cross, square = flat[0].new_zeros(num_out, flat[0].shape[1]), flat[0].new_zeros(num_out)
        for batch, x in enumerate(flat):
            target = self.outputs[module][batch] + self.gap[batch] - (0 if bias is None else bias.float())
            cross.addmm_(target.T, x)
            square += target.square().sum(dim=0)
        return Moments(inputs.gram, cross, square)

    def advance(self, module: nn.Module, batch: int, output: Tensor) -> None:
        """The pruned stream has added `output` of a module: the gap changes by what the dense one added instead."""
        if module in self.residual:
            self.gap[batch] += self.outputs[module][batch] - self.engine._flat(output, batch)


def _adds_up(written: list[Tensor], added: Tensor) -> bool:
    """Whether what a block adds to its input is the sum of these outputs, each [T, D]."""
    if not written or any(output.shape != added.shape for output in written):
        return False
    return float((sum(written) - added).norm()) <= 0.01 * float(added.norm())


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


def _check_recipe(recipe: MamaPruningConfig) -> None:
    if not isinstance(recipe, MamaPruningConfig):
        raise TypeError(f"recipe must be a MamaPruningConfig, not {type(recipe).__name__}.")
    refused = {
        "criterion": (recipe.criterion in _GRADIENT_CRITERIA, '"mama", "wanda", "sparsegpt", "magnitude" or "random"'),
        "scope": (recipe.scope == "global", '"layer", "row" or None (allocation="owl" lets layers differ)'),
        "regrowth": (recipe.regrowth != 0, "0.0"),
    }
    for name, (asked, instead) in refused.items():
        if asked:
            raise ValueError(
                f"{name}={getattr(recipe, name)!r} needs training, and prune_model does none; set {name}={instead}, "
                "or train with MamaPruningCallback."
            )
