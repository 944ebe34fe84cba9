"""The work of `prune_model` on one block after another, and the streams of hidden states between them.

Shapes: B = sequences, T = tokens (without padding), I = in, O = out, D = hidden size.
"""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from . import blocks as walk
from .allocation import outlier_ratio, owl_sparsities
from .calibration import Batch
from .config import MamaPruningConfig
from .dense import DensePass
from .report import OneShotReport
from .resume import Progress
from .rules import prune_layer
from .solvers import Inputs, Moments
from .structured import StructuredRule
from .targets import Target, is_linear, writes_to_residual


logger = logging.getLogger(__name__)


class Engine:
    """The streams and the work on one block after another."""

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: MamaPruningConfig,
        batches: list[Batch],
        targets: list[Target],
        device: str | torch.device | None,
        iterations: int,
        structured: StructuredRule | None = None,
    ) -> None:
        self.structured = structured
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
        if self.structured is not None and self.recipe.scope == "global":
            self.structured.share_out(self._input_squares(hidden))
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
            try:
                rows = self._prune_jointly(index) if two_streams else self._prune_apart(index)
            finally:
                block.to(home)
            self.rows += rows
            bar.set_postfix_str(f"{self.name}.{index}, error {max((row['error'] for row in rows), default=0):.4f}")
            changed = self.targets.values() if self.structured is None else self.structured.changed
            members = [target for target in changed if target.module in set(block.modules())]
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
        """The rows of a batch's tensor [B, T, n] that are no padding, fp32."""
        return walk.flatten(tensor, self.tokens[batch])

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
        dense = DensePass(
            self.blocks[index],
            [self._call(index, batch) for batch in range(len(self.batches))],
            [self._here(hidden) for hidden in self.dense],
            [self._here(hidden) for hidden in self.pruned],
            self.tokens,
            modules,
        )
        self.dense = [output.to(hidden.device) for output, hidden in zip(dense.hidden, self.dense)]
        if not dense.residual and index == 0:
            logger.warning(
                "What the layers of %s add to the residual stream is not the plain sum of their linear outputs, so "
                "these aim at the dense model's outputs and don't repair the error that has built up.",
                self.name,
            )
        known: list[dict[nn.Module, Any]] = [{} for _ in self.batches]
        rows = []
        for group in dense.groups:
            reached = [
                walk.run_to(group[0], self.blocks[index], self._here(hidden), self._call(index, batch), known[batch])
                for batch, hidden in enumerate(self.pruned)
            ]
            if group is dense.groups[-1]:  # the widest outputs are held no longer than needed
                for outputs in known:
                    for module in [each for each in outputs if is_linear(each)]:
                        del outputs[module]
            if any(module in self.targets for module in group):
                rows += self._prune_group(group, index, dense, reached)
            for batch, x in enumerate(reached):
                for module in group:
                    output = known[batch][module] = module(x)
                    dense.advance(module, batch, output)
            dense.inputs.pop(group[0], None)
            for module in group:
                dense.outputs.pop(module, None)
            del reached, x
        if index + 1 < len(self.blocks):
            for batch, hidden in enumerate(self.pruned):
                output = walk.run(self.blocks[index], self._here(hidden), self._call(index, batch), known[batch])
                self.pruned[batch] = output.to(hidden.device)
        return rows

    def _prune_group(
        self, group: list[nn.Module], index: int, dense: DensePass, reached: list[Tensor]
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
        inputs.finish()
        if not inputs.is_finite:
            raise ValueError(
                f"{self.name}.{index}: the calibration activations are NaN or infinite. The model is left as it was."
            )

    def _rows(self, module: nn.Module) -> Tensor:
        target = self.targets[module]
        return target.to_rows(target.weight).float()

    def _prune_one(
        self, module: nn.Module, index: int, inputs: Inputs, moments: Moments, start: float
    ) -> dict[str, Any]:
        target, seed = self.targets[module], self.order[module]
        dtype = target.parameter.dtype
        changes: list[tuple[nn.Parameter, Tensor]] = []
        if self.structured is not None:
            result, changes = self.structured.prune(target, dtype, inputs, moments, seed)
        else:
            sparsity = self.sparsities[index]
            result = prune_layer(
                self.recipe, self._rows(module), dtype, inputs, moments, sparsity, self.iterations, seed
            )
        for parameter, values in [(target.parameter, target.from_rows(result.values)), *changes]:
            self._remember(parameter)
            parameter.data.copy_(values)
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
        ratios = [
            outlier_ratio(self._rows(module).abs() * x.sqrt() for module, x in squares.items())
            for squares in self._input_squares(hidden)
        ]
        return owl_sparsities(ratios, self.sparsities[0])

    def _input_squares(self, hidden: list[Tensor]) -> Iterator[dict[nn.Module, Tensor]]:
        """Block by block, the sums of squares [I] of what comes into each target, from a pass over the dense model."""
        streams = list(hidden)
        for index, block in enumerate(self.blocks):
            modules = self._modules(index)
            squares: dict[nn.Module, Tensor] = {}
            for batch, state in enumerate(streams):
                streams[batch], records = walk.record(modules, block, state, self.calls[batch][index])
                for entry in records:
                    square = self._flat(entry.input, batch).square().sum(dim=0)
                    squares[entry.module] = squares[entry.module] + square if entry.module in squares else square
            yield squares
