"""What the dense model does in one block, and how far the pruned stream is from it.

Shapes: B = sequences, T = tokens (without padding), I = in, D = hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Call, Record, flatten, group_by_input, record
from .solvers import Inputs, Moments
from .targets import writes_to_residual


class DensePass:
    """
    A pass of the dense stream through a block that is not pruned yet, and the targets that follow from it.

    Args:
        block (`nn.Module`): the block.
        calls (`Sequence[Call]`): of the block, in each batch.
        dense (`Sequence[torch.Tensor]`): hidden states [B, T, D] of the dense stream, in each batch.
        pruned (`Sequence[torch.Tensor]`): the same of the pruned stream.
        tokens (`Sequence[torch.Tensor]`): bool [B * T] of each batch: what is no padding.
        modules (`dict`): the block's targets and all that write to its residual stream, with their names.
    """

    def __init__(
        self,
        block: nn.Module,
        calls: Sequence[Call],
        dense: Sequence[Tensor],
        pruned: Sequence[Tensor],
        tokens: Sequence[Tensor],
        modules: dict[nn.Module, str],
    ) -> None:
        self.tokens = tokens
        self.groups: list[list[nn.Module]] = []
        self.inputs: dict[nn.Module, list[Tensor]] = {}
        self.outputs: dict[nn.Module, list[Tensor]] = {}
        self.squares: dict[nn.Module, Tensor] = {}
        self.hidden: list[Tensor] = []  # behind the block
        # dense minus pruned residual stream [T, D] of each batch, where the block adds its next output
        self.gap: list[Tensor] = []
        # the modules whose output is added to the residual stream; none where that can't be told
        self.residual = {module for module, name in modules.items() if writes_to_residual(name)}
        for batch, (before, other) in enumerate(zip(dense, pruned)):
            after, records = record(modules, block, before, calls[batch])
            if batch == 0:
                self.groups = group_by_input(records)
                self._check_residual(records, before, after)
            self._take(records, batch)
            self.hidden.append(after)
            self.gap.append(flatten(before, tokens[batch]) - flatten(other, tokens[batch]))

    def _check_residual(self, records: list[Record], before: Tensor, after: Tensor) -> None:
        """Where what the block adds is not the sum of these outputs, as a norm stands between, they are not used."""
        added = flatten(after, self.tokens[0]) - flatten(before, self.tokens[0])
        written = [flatten(entry.output, self.tokens[0]) for entry in records if entry.module in self.residual]
        rounding = 2 * torch.finfo(after.dtype).eps * float(after.float().norm())
        if (
            not written
            or any(output.shape != added.shape for output in written)
            or float((torch.stack(written).sum(dim=0) - added).norm()) > 0.01 * float(added.norm()) + rounding
        ):
            self.residual = set()

    def _take(self, records: list[Record], batch: int) -> None:
        first = {group[0] for group in self.groups if not self.residual.issuperset(group)}
        for entry in records:
            if entry.module in first:
                self.inputs.setdefault(entry.module, []).append(flatten(entry.input, self.tokens[batch]))
            output = flatten(entry.output, self.tokens[batch])
            if entry.module in self.residual:
                self.outputs.setdefault(entry.module, []).append(output)
                continue
            square = _without_bias(output, entry.module).square().sum(dim=0)
            self.squares[entry.module] = self.squares[entry.module] + square if batch else square

    def residual_moments(self, module: nn.Module, inputs: Inputs, flat: Sequence[Tensor]) -> Moments:
        """
        Target of a module that writes to the residual stream: its dense output plus the gap, without its bias.

        Args:
            flat (`Sequence[torch.Tensor]`): its inputs [T, I] in the pruned stream, in each batch.
        """
        num_out = self.gap[0].shape[1]
        cross, square = flat[0].new_zeros(num_out, flat[0].shape[1]), flat[0].new_zeros(num_out)
        for batch, x in enumerate(flat):
            target = _without_bias(self.outputs[module][batch] + self.gap[batch], module)
            cross.addmm_(target.T, x)
            square += target.square().sum(dim=0)
        return Moments(inputs.gram, cross, square)

    def advance(self, module: nn.Module, batch: int, output: Tensor) -> None:
        """The pruned stream has added `output` of a module: the gap changes by what the dense one added instead."""
        if module in self.residual:
            self.gap[batch] += self.outputs[module][batch] - flatten(output, self.tokens[batch])


def _without_bias(output: Tensor, module: nn.Module) -> Tensor:
    bias: Any = module.bias
    return output if bias is None else output - bias.float()
