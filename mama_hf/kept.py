"""The last state that held the reward: weights and masks, one copy in host memory."""

import math
from typing import Any

import torch
from torch import Tensor, nn


class KeptState:
    """
    A copy of what training and pruning change. The optimizer's state is not part of it: what is put back is a result,
    and training does not go on from it.

    Args:
        parameters (`dict[str, nn.Parameter]`): by name; all that may change.

    Attributes:
        step (`int`): the optimizer step after which the copy was taken.
        reward (`float`): what the reward check measured of it.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.weights: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.step, self.reward = 0, math.nan

    @torch.no_grad()
    def keep(self, masks: dict[str, Tensor], step: int, reward: float) -> None:
        """
        Copy the parameters, as they are now, and their masks.

        Args:
            masks (`dict[str, torch.Tensor]`): bool, by name; empty before anything is pruned.
        """
        for name, parameter in self.parameters.items():
            if name in self.weights:
                self.weights[name].copy_(parameter)
            else:
                self.weights[name] = parameter.detach().to("cpu", copy=True)
        self.masks = {name: mask.to("cpu", copy=True) for name, mask in masks.items()}
        self.step, self.reward = step, reward

    @torch.no_grad()
    def restore_(self) -> None:
        """Put the weights back, in place. Masks are their owner's to put in force."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.weights[name])

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values) for `load_state_dict`."""
        tensors = {f"weight.{name}": weight for name, weight in self.weights.items()}
        tensors |= {f"mask.{name}": mask for name, mask in self.masks.items()}
        return tensors, {"step": self.step, "reward": self.reward}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises `KeyError` if a weight is missing."""
        self.weights = {name: tensors[f"weight.{name}"] for name in self.parameters}
        self.masks = {key.removeprefix("mask."): mask for key, mask in tensors.items() if key.startswith("mask.")}
        self.step, self.reward = values["step"], values["reward"]
