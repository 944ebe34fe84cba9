"""Masks on weights and on the optimizer's state. In place, in few passes, without a device sync."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .targets import LoraTarget, Target


# State that only scales the step. It may stay as it is at a pruned weight: without momentum there is nothing to scale,
# and what it says of the gradient there is the score by which regrowth chooses.
_SCALES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def check_optimizer(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> dict[str, Tensor]:
    """
    The state that `optimizer` will keep for a weight, found out by one step on a stand-in before training starts.

    Args:
        optimizer (`torch.optim.Optimizer`): not wrapped by accelerate; neither it nor its parameters are touched.
        dtype (`torch.dtype`): of the weights to be pruned.

    Returns:
        `dict`: state key -> example tensor; those of a weight's shape are masked or read per entry.

    Raises:
        `ValueError`: if that state is not one number per weight (8-bit, factored), so that it can't be masked.
    """
    stand_in = nn.Parameter(torch.ones(256, 128, dtype=dtype))
    stand_in.grad = torch.ones_like(stand_in)
    probe = copy.copy(optimizer)  # without the scheduler's wrapper around `step`, which is bound to the original
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    probe.param_groups, probe.state = [{**group, "params": [stand_in]}], defaultdict(dict)
    name = type(optimizer).__name__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            type(optimizer).step(probe)
    except Exception as error:
        raise ValueError(
            f"The optimizer {name} could not be examined ({error}), so its state can't be masked. Use one that keeps "
            "plain per-weight state, such as adamw_torch, adamw_torch_fused or sgd."
        ) from error
    state = {key: value for key, value in probe.state[stand_in].items() if isinstance(value, Tensor)}
    for key, value in state.items():
        if value.numel() > 1 and (value.shape != stand_in.shape or not value.is_floating_point()):
            raise ValueError(
                f"The optimizer {name} keeps {key!r} as {value.dtype} {tuple(value.shape)} for a weight of shape "
                f"{tuple(stand_in.shape)}: that can't be masked. Use one with a number per weight, such as "
                "adamw_torch."
            )
    return state


def momenta(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """The optimizer's running directions for a parameter: what would move a pruned weight away from zero."""
    return [
        value
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and key not in _SCALES
    ]


Saved = list[tuple[Tensor, Any, Tensor]]


@torch.no_grad()
def save_values(targets: Sequence[Target], gone: Sequence[Tensor], optimizer: torch.optim.Optimizer | None) -> Saved:
    """
    Copy what is lost when the entries `gone` are masked: these entries of the weights and of their momenta. For LoRA
    it is the whole base weight, of which every pruned entry changes.

    Args:
        gone (`Sequence[torch.Tensor]`): bool, of the parameters' shapes; True where a kept entry will be pruned.

    Returns:
        `list`: (tensor, index, the values there), for `restore_values_`.
    """
    saved: Saved = []
    for target, index in zip(targets, gone):
        if isinstance(target, LoraTarget):
            saved.append((target.parameter, ..., target.parameter.data))  # masking it makes a new tensor
            continue
        state = momenta(optimizer, target.parameter) if optimizer is not None else []
        saved += [(tensor, index, tensor.data[index]) for tensor in (target.parameter, *state)]
    return saved


@torch.no_grad()
def restore_values_(saved: Saved) -> None:
    """Put back what `save_values` copied."""
    for tensor, index, values in saved:
        tensor.data[index] = values


@torch.no_grad()
def apply_masks_(targets: Sequence[Target], masks: Sequence[Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """
    Zero the pruned weights and their momenta, in one fused pass over both.

    Args:
        targets (`Sequence[Target]`): the weights.
        masks (`Sequence[torch.Tensor]`): bool, of the parameters' shapes.
        optimizer (`torch.optim.Optimizer`, *optional*): whose state is masked too.
    """
    tensors, factors = [], []
    for target, mask in zip(targets, masks):
        if isinstance(target, LoraTarget):
            target.apply_mask_(mask)  # its momenta are those of the factors: no entry of theirs is one weight
            continue
        state = momenta(optimizer, target.parameter) if optimizer is not None else []
        tensors += [target.parameter.data, *state]
        factors += [mask] * (1 + len(state))
    if tensors:
        torch._foreach_mul_(tensors, factors)
