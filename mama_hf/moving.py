"""Moving the values of pruned weights onto kept ones while a model trains: `move_values` in a trainer.

At a mask update the layer's outputs before it are the target, on the inputs of the last optimizer steps. What is
stored of these is a Gram matrix [I, I] in fp32 for each distinct input (query, key and value projections read the same
one, and so do gate and up), from `COLLECT_STEPS` before an update until it.

Shapes: I = in, O = out, T = tokens.
"""

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import InputHooks
from .solvers import Inputs, Moments, better_rows, bias_change, least_squares, move_mean
from .statistics import sum_over_ranks
from .targets import LoraTarget, Target


logger = logging.getLogger(__name__)

COLLECT_STEPS = 4
SOLVER_STEPS = 10
GRAM_LIMIT_BYTES = 8 * 1024**3


_REFUSED = {
    "none": lambda target: False,
    "mean": lambda target: isinstance(target, LoraTarget),
    "bias": lambda target: isinstance(target, LoraTarget) or not target.has_input or target.module.bias is None,
    "least_squares": lambda target: isinstance(target, LoraTarget) or not target.has_input,
}
_REASONS = {
    "mean": "the base weight inside a LoRA layer is frozen",
    "bias": "that needs a layer with a bias and a visible input, and no LoRA",
    "least_squares": "that needs a layer with a visible input (no experts), and no LoRA",
}


def check_movable(targets: Sequence[Target], rule: str) -> None:
    """Raises `ValueError` for weights whose values can't be moved by the rule in training."""
    names = [target.name for target in targets if _REFUSED[rule](target)]
    if names:
        raise ValueError(
            f"move_values={rule!r} does not work in training for {names[0]} ({len(names)} such weights): "
            f'{_REASONS[rule]}. Exclude them, or set move_values="none".'
        )


def _rank() -> int:
    return (
        torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
    )


class ValueMover:
    """
    Collects the inputs' moments, and moves values at a mask update.

    Args:
        targets (`Sequence[Target]`): the weights.
        rule (`str`): `"none"`, `"mean"`, `"bias"` or `"least_squares"`.

    Raises:
        `ValueError`: for weights whose values can't be moved by this rule.
    """

    def __init__(self, targets: Sequence[Target], rule: str) -> None:
        self.targets, self.rule = list(targets), rule
        check_movable(self.targets, rule)
        self.is_collecting = False
        self.inputs: dict[int, Inputs] = {}  # of the first target that reads an input
        self._first: dict[int, int] = {}  # target -> the first one that reads the same input
        self._last: tuple[int, weakref.ref[Tensor]] | None = None
        self._hooks = InputHooks(self.targets, self._take)

    def attach(self, model: nn.Module) -> None:
        """Register the hooks that the rule needs."""
        if self.rule in ("bias", "least_squares"):
            self._hooks.attach(model)

    def detach(self) -> None:
        """Remove them."""
        self._hooks.detach()

    def _take(self, index: int, x: Tensor) -> None:
        if not self.is_collecting:
            return
        if index not in self._first:
            shared = self._last is not None and self._last[1]() is x
            self._first[index] = self._first[self._last[0]] if shared and self._last else index
            self._last = index, weakref.ref(x)
        if self._first[index] != index:
            return
        if index not in self.inputs:
            self.inputs[index] = Inputs(x.shape[-1], x.device)
            self._check_size()
        self.inputs[index].add(*self._hooks.rows(x))

    def _check_size(self) -> None:
        size = sum(4 * inputs.gram.numel() for inputs in self.inputs.values())
        if size > GRAM_LIMIT_BYTES:
            raise ValueError(
                f"move_values={self.rule!r} needs more than {GRAM_LIMIT_BYTES / 1024**3:.0f} GiB for Gram matrices "
                '[I, I] of the layers\' inputs. Set move_values="mean" or "none", exclude the widest layers, or prune '
                "with prune_model, which holds one block's at a time."
            )

    def observe(self) -> None:
        """A step's inputs are complete: the first rank takes over what all have seen (and may save it)."""
        for index in sorted(self.inputs):
            inputs = self.inputs[index]
            count = torch.as_tensor(inputs.num_tokens, device=inputs.gram.device)
            for tensor in (inputs.gram, inputs.total, count):
                sum_over_ranks(tensor)
                if _rank() > 0:
                    tensor.zero_()
            inputs.num_tokens = count

    def save(self, initial: Sequence[Tensor | None] | None = None) -> list[tuple[Tensor, Any, Tensor]]:
        """Copies of all that `move_` may change, for `restore_values_`."""
        if self.rule == "none":
            return []
        return [(tensor, ..., tensor.data.clone()) for tensor in [*self.changing_tensors(), *(initial or [])]]

    def changing_tensors(self) -> list[Any]:
        """The parameters that `move_` may change."""
        if self.rule == "none":
            return []
        biases = [target.module.bias for target in self.targets] if self.rule == "bias" else []
        return [target.parameter for target in self.targets] + biases

    @torch.no_grad()
    def move_(self, masks: Sequence[Tensor], initial: Sequence[Tensor | None] | None = None) -> None:
        """
        Move the values of what `masks` prunes, in place; the pruned weights are zero afterwards.

        Args:
            masks (`Sequence[torch.Tensor]`): bool, of the parameters' shapes.
            initial (`Sequence[torch.Tensor]`, *optional*):
                the weights before training, where displacement is a statistic. They move along, so that what training
                displaces stays apart from what is moved here.
        """
        if self.rule == "none":
            return
        for inputs in self.inputs.values():
            sum_over_ranks(inputs.gram), sum_over_ranks(inputs.total)
            inputs.num_tokens = sum_over_ranks(torch.as_tensor(inputs.num_tokens, device=inputs.gram.device))
            inputs.finish()
        for index, (target, mask) in enumerate(zip(self.targets, masks)):
            values = target.from_rows(self._moved(index, mask))
            if initial is not None:
                start = initial[index]
                assert start is not None, "every target has one"
                start += values - target.weight
            target.parameter.data.copy_(values)

    def forget(self) -> None:
        """The update is over: what was collected for it is used up."""
        self.inputs.clear()

    def _moved(self, index: int, mask: Tensor) -> Tensor:
        """The new values of a weight [O, I], fp32."""
        target = self.targets[index]
        weight, kept = target.to_rows(target.weight).float(), target.to_rows(mask)
        values = weight * kept
        inputs = self.inputs.get(self._first.get(index, index))
        if self.rule == "mean":
            values = move_mean(weight, kept)
        elif inputs is not None and not inputs.is_finite:
            logger.warning("%s: its inputs were NaN or infinite, so its pruned values are not moved.", target.name)
        elif inputs is not None and self.rule == "bias":
            bias: Any = target.module.bias
            bias.data += bias_change(weight, kept, inputs.mean).to(bias.dtype)
        elif inputs is not None:
            moments = Moments.plain(weight, inputs.gram)
            moved = least_squares(weight, kept, moments, SOLVER_STEPS, inputs.system())
            values = better_rows(values, moved.to(target.parameter.dtype).float(), moments)[0]
        return values

    def state_dict(self) -> dict[str, Tensor]:
        """What was collected since the last update; the first rank has all of it."""
        tensors = {}
        for index, inputs in self.inputs.items():
            name = self.targets[index].name
            tensors[f"gram.{name}"], tensors[f"total.{name}"] = inputs.gram, inputs.total
            tensors[f"num_tokens.{name}"] = torch.as_tensor(inputs.num_tokens).cpu()
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, on the first rank."""
        self.inputs = {}
        for index, target in enumerate(self.targets):
            if f"gram.{target.name}" in tensors and _rank() == 0:
                inputs = self.inputs[index] = Inputs(target.num_inputs, target.parameter.device)
                inputs.gram.copy_(tensors[f"gram.{target.name}"])
                inputs.total.copy_(tensors[f"total.{target.name}"])
                inputs.num_tokens = tensors[f"num_tokens.{target.name}"].to(target.parameter.device)
