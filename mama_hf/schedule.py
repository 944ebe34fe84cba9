"""Sparsity as a function of the optimizer step: pure numbers, no tensor and no model in here.

A step is the trainer's `global_step` after the optimizer has run, so the first step of a run is 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from .config import AUTO_CEILING, MamaPruningConfig


# Progress in [0, 1] -> share of the way from the initial to the final sparsity.
# "cubic" is Zhu & Gupta 2017 (arXiv 1710.01878), eq. 1: most is pruned early, while there is time left to recover.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cubic": lambda progress: 1.0 - (1.0 - progress) ** 3,
    "linear": lambda progress: progress,
    "one-shot": lambda progress: 1.0,
}

DEFAULT_NUM_UPDATES = 40
CHECKED_UPDATE_EVERY = 2  # with a reward check in short runs: it costs up to a third of a step, and may cost a tenth


@dataclass(frozen=True)
class PruningSchedule:
    """
    When the masks change, and how sparse the model is after each change.

    Args:
        shape (`str`): a key of `SCHEDULES`.
        start (`int`): first step at which weights are pruned; `initial_sparsity` holds before it.
        end (`int`): step from which `final_sparsity` holds and the masks are frozen.
        initial_sparsity (`float`): fraction of zeros at `start`.
        final_sparsity (`float`): fraction of zeros from `end` on.
        update_every (`int`): steps between two mask updates.
    """

    shape: str
    start: int
    end: int
    initial_sparsity: float
    final_sparsity: float
    update_every: int

    def sparsity(self, step: int) -> float:
        """Fraction of zeros asked for after `step`: 0 before `start`, exactly `final_sparsity` from `end` on."""
        if step < self.start:
            return 0.0
        if step >= self.final_step:
            return self.final_sparsity
        share = SCHEDULES[self.shape]((step - self.start) / (self.end - self.start))
        return min(self.final_sparsity, self.initial_sparsity + (self.final_sparsity - self.initial_sparsity) * share)

    def is_update(self, step: int) -> bool:
        """Whether the masks change at the end of `step`."""
        if self.shape == "one-shot":
            return step == self.start
        return step == self.end or (self.start <= step < self.end and (step - self.start) % self.update_every == 0)

    @property
    def final_step(self) -> int:
        """The step at the end of which the final sparsity is reached."""
        return self.start if self.shape == "one-shot" else self.end


def resolve_step(value: int | float, max_steps: int) -> int:
    """A recipe's `start` or `end` in steps: an int is one already, a float is a fraction of `max_steps`."""
    return value if isinstance(value, int) else round(value * max_steps)


def resolve_schedule(config: MamaPruningConfig, max_steps: int, alignment: int = 1) -> PruningSchedule:
    """
    The schedule of one run.

    Args:
        config (`MamaPruningConfig`): the recipe.
        max_steps (`int`): optimizer steps of the run.
        alignment (`int`, *optional*, defaults to 1):
            updates fall on multiples of it (generation boundaries in GRPO): `start` is rounded up to one, `end` down.

    Raises:
        `ValueError`: where the run ends before the final sparsity is reached.
    """
    if max_steps < 1:
        raise ValueError(f"The run has max_steps={max_steps}: there is no step to prune in.")
    start, end = cast(int | float, config.start), cast(int | float, config.end)
    first, last = max(1, resolve_step(start, max_steps)), max(1, resolve_step(end, max_steps))
    if last > max_steps:
        raise ValueError(
            f"Pruning ends at step {last} (end={end}), but the run has only max_steps={max_steps}: it would stop "
            f"half-pruned. Set end to at most {max_steps} or train for at least {last} steps."
        )
    if first > last:
        raise ValueError(f"Pruning starts at step {first} (start={start}) and ends before it, at {last} (end={end}).")
    first = math.ceil(first / alignment) * alignment
    last = max(first, last // alignment * alignment)
    if last > max_steps:
        raise ValueError(
            f"Masks change only every {alignment} steps (a generation batch lasts that long), and the first such step "
            f"at or after start={start} is {first}, beyond max_steps={max_steps}. Start earlier or train longer."
        )
    closest = 1 if config.reward_tolerance is None else CHECKED_UPDATE_EVERY
    every = config.update_every or max(closest, round((last - first) / DEFAULT_NUM_UPDATES))
    return PruningSchedule(
        shape=config.schedule,
        start=first,
        end=last,
        initial_sparsity=config.initial_sparsity,
        final_sparsity=AUTO_CEILING if config.final_sparsity == "auto" else cast(float, config.final_sparsity),
        update_every=math.ceil(every / alignment) * alignment,
    )
