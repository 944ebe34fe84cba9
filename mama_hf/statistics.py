"""What training tells about each weight: fp32 accumulators, read from Adam's state where it has them already.

Gradients arrive clipped, by a coefficient that changes from step to step and that a callback can't see. So the
accumulators take g / ||g||, the norm over all targets: any common factor of a step cancels, clipped or not. A step
without a signal (zero gradient) or with a non-finite one leaves them as they were, decided on the device, no sync.

Shapes: I = in, T = tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .inputs import InputHooks
from .targets import LoraTarget, Target


DEFAULT_EMA_DECAY = 0.9

# name -> the per-entry quantity of one step, from the normalised gradient g and the weight w
_PER_STEP = {
    "gradient_square": lambda g, w: g * g,
    "movement": lambda g, w: -g * w,
    "taylor": lambda g, w: (g * w).abs_(),
    "fisher": lambda g, w: (g * w).square_(),
}


class Statistics:
    """
    Collects the named statistics of the targets, and only those.

    Args:
        targets (`Sequence[Target]`): the weights.
        names (`tuple[str, ...]`):
            of "gradient_square", "movement", "taylor", "fisher", "initial_weight", "input_norm", "noise".
        ema_decay (`float`, *optional*): decay per step of the gradient averages. `None`: `gradient_square` decays by
            0.9 (or is read from Adam), the others are sums.
        adam (`bool`, *optional*, defaults to `False`): the optimizer keeps `exp_avg_sq` in fp32: `gradient_square` is
            read from there. Factors of LoRA are not weights, so their targets get an accumulator all the same.
        seed (`int`, *optional*, defaults to 0): of "noise".
    """

    def __init__(
        self,
        targets: Sequence[Target],
        names: tuple[str, ...],
        ema_decay: float | None = None,
        adam: bool = False,
        seed: int = 0,
    ) -> None:
        self.targets, self.names, self.ema_decay, self.seed = list(targets), names, ema_decay, seed
        self.read_adam = adam and ema_decay is None and "gradient_square" in names
        self.accumulators: dict[str, list[Tensor | None]] = {}
        for name in names:
            if name in _PER_STEP:
                self.accumulators[name] = [self._zeros(target, name) for target in targets]
            elif name == "initial_weight":
                self.accumulators[name] = [target.weight.float().clone() for target in targets]
            elif name == "input_norm":
                self.accumulators[name] = [
                    torch.zeros(target.num_inputs, device=target.parameter.device) for target in targets
                ]
        device = targets[0].parameter.device
        self.num_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=device)
        # of the forward passes since the last step, on this rank
        self._pending = [
            torch.zeros_like(values) for values in self.accumulators.get("input_norm", []) if values is not None
        ]
        self._hooks = InputHooks(self.targets, self._add_input)

    def _zeros(self, target: Target, name: str) -> Tensor | None:
        if name == "gradient_square" and self.read_adam and not isinstance(target, LoraTarget):
            return None
        return torch.zeros(target.parameter.shape, dtype=torch.float32, device=target.parameter.device)

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the gradients of one optimizer step: accumulated over micro-batches, averaged over ranks."""
        self._take_inputs()
        names = [name for name in self.accumulators if name in _PER_STEP]
        live = [
            (index, target)
            for index, target in enumerate(self.targets)
            if any(self.accumulators[name][index] is not None for name in names) and target.gradient is not None
        ]
        if not live:
            return
        device = self.num_steps.device
        norm = torch.stack([_norm(target.gradient).to(device) for _, target in live]).norm()
        finite = norm.isfinite()
        counts = finite & (norm > 0)
        self.num_steps += counts
        self.num_skipped += ~finite
        scale = torch.where(counts, norm, 1.0).reciprocal()
        for index, target in live:
            gradient, weight = target.gradient, target.weight.float()
            assert gradient is not None, "live targets have one"
            gradient = gradient.float() * scale.to(gradient.device)
            for name in names:
                self._accumulate_(self.accumulators[name][index], _PER_STEP[name](gradient, weight), name, counts)

    def skip(self) -> None:
        """Forget what was seen of a step that says nothing."""
        for pending in self._pending:
            pending.zero_()

    def _take_inputs(self) -> None:
        """Add the inputs of this step, of all ranks: each rank holds the same sums, so that any may save them."""
        if not self._pending:
            return
        seen = sum_over_ranks(torch.cat([pending.to(self._pending[0].device) for pending in self._pending]))
        parts = seen.split([pending.numel() for pending in self._pending])
        for total, pending, part in zip(self.accumulators["input_norm"], self._pending, parts):
            assert total is not None
            total += part.to(total.device)
            pending.zero_()

    def _accumulate_(self, accumulator: Tensor | None, value: Tensor, name: str, counts: Tensor) -> None:
        if accumulator is None:
            return
        decay = DEFAULT_EMA_DECAY if self.ema_decay is None and name == "gradient_square" else self.ema_decay
        updated = accumulator + value if decay is None else torch.lerp(accumulator, value, 1 - decay)
        torch.where(counts.to(value.device), updated, accumulator, out=accumulator)

    def read(self, name: str, index: int, optimizer: torch.optim.Optimizer | None, step: int) -> Tensor:
        """
        A statistic of target `index`, fp32, of the weight's shape (`input_norm`: broadcastable to it). It may be the
        accumulator itself, or Adam's: not to be changed.

        Args:
            optimizer (`torch.optim.Optimizer`, *optional*): whose `exp_avg_sq` is read.
            step (`int`): seeds "noise", so that a resumed run draws the same.
        """
        target = self.targets[index]
        if name == "noise":
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 10_007 + index)
            return torch.rand(target.parameter.shape, generator=generator).to(target.parameter.device)
        accumulator = self.accumulators[name][index]
        if accumulator is None:
            assert optimizer is not None, "Adam's state is read through the optimizer"
            state = optimizer.state.get(target.parameter, {})
            return state["exp_avg_sq"] if "exp_avg_sq" in state else torch.zeros_like(target.weight)
        if name == "input_norm":
            norm = (accumulator + self._pending[index]).sqrt_()
            return norm if target.input_dim == -1 else norm.unsqueeze(-1)
        return accumulator

    def attach(self, model: nn.Module) -> None:
        """Register the forward hooks of "input_norm". Padding tokens, evaluation and generation don't count."""
        if "input_norm" in self.names:
            self._hooks.attach(model)

    def detach(self) -> None:
        """Remove the hooks."""
        self._hooks.detach()

    def _add_input(self, index: int, x: Tensor) -> None:
        self._pending[index] += self._hooks.rows(x)[0].square().sum(dim=0)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name; what Adam's own state holds is in the optimizer's checkpoint."""
        tensors = {"num_steps": self.num_steps.clone(), "num_skipped": self.num_skipped.clone()}
        for name, values in self.accumulators.items():
            for target, value in zip(self.targets, values):
                if value is not None:
                    tensors[f"{name}.{target.name}"] = value
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave. Raises `KeyError` for a missing tensor."""
        self.num_steps.copy_(tensors["num_steps"])
        self.num_skipped.copy_(tensors["num_skipped"])
        for name, values in self.accumulators.items():
            for target, value in zip(self.targets, values):
                if value is not None:
                    value.copy_(tensors[f"{name}.{target.name}"])


def _norm(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "live targets have one"
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)).float()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place; with one process, the tensor."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor
