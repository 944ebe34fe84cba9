"""What comes into the targets' modules while a model trains: padding, evaluation and generation don't count.

Shapes: T = tokens of a forward pass, padding included, I = in.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .targets import Target


class InputHooks:
    """
    Forward hooks that show the inputs of the targets' modules in training.

    Args:
        targets (`Sequence[Target]`): whose modules are called with the weight's input.
        take (`Callable`): called as `take(index of the target, input [..., I])`, without graph. See `rows`.
    """

    def __init__(self, targets: Sequence[Target], take: Callable[[int, Tensor], None]) -> None:
        self.targets, self._take = targets, take
        self._hooks: list[Any] = []
        self._attention_mask: Tensor | None = None

    def attach(self, model: nn.Module) -> None:
        """Register the hooks."""
        self._hooks.append(model.register_forward_pre_hook(self._see_attention_mask, with_kwargs=True))
        for index, target in enumerate(self.targets):
            self._hooks.append(target.module.register_forward_pre_hook(self._hook(index)))

    def detach(self) -> None:
        """Remove them."""
        while self._hooks:
            self._hooks.pop().remove()
        self._attention_mask = None

    def rows(self, inputs: Tensor) -> tuple[Tensor, Tensor | int]:
        """Inputs [..., I] as fp32 rows [T, I], zero where they are padding, and how many are not."""
        rows = inputs.float()
        mask = self._attention_mask
        if mask is None or inputs.shape[:-1] != mask.shape:
            return rows.reshape(-1, inputs.shape[-1]), inputs[..., 0].numel()
        return (rows * mask.unsqueeze(-1)).reshape(-1, inputs.shape[-1]), mask.sum()

    def _see_attention_mask(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._attention_mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _hook(self, index: int) -> Callable[[nn.Module, tuple], None]:
        def see(module: nn.Module, args: tuple) -> None:
            if module.training and torch.is_grad_enabled():
                with torch.no_grad():
                    self._take(index, args[0])

        return see
