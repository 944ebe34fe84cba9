"""Whether a mask update may stay, decided by the reward on held-out prompts. Pure numbers: no tensor, no trainer."""

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


logger = logging.getLogger(__name__)

HOLD_UPDATES = 2  # updates left out after a roll-back: training recovers meanwhile
BACK_OFF = 0.5  # the next step of the sparsity, as a share of the one that was rolled back
SPEED_UP = 1.25  # growth of the step after each update that stays
MIN_STEP = 0.002  # smallest step of the sparsity that is tried
VOUCH_STEPS = 10  # optimizer steps for which a check that was passed stands for the one before the next update
ROUNDING = 1e-6  # of a mean of fp32 rewards


@dataclass
class RewardState:
    """
    What a check remembers, as JSON types.

    Args:
        first (`float`, *optional*): reward before training.
        best (`float`, *optional*): running best of all checks.
        last (`float`, *optional*): reward at the newest check.
        step_limits (`dict`): kind of unit -> largest rise of its sparsity at the next update; none: no limit.
        holds (`dict`): kind of unit -> updates still to be left out.
        num_checks, num_rollbacks, num_held (`int`): measurements, updates taken back, updates left out.
        passed_at (`int`, *optional*): step of the newest measurement, if it was good and the model is still that one
            but for training.
        judged_at (`int`, *optional*): step at which training ended.
        is_good_at_end (`bool`): whether the reward held until then.
    """

    first: float | None = None
    best: float | None = None
    last: float | None = None
    step_limits: dict[str, float] = field(default_factory=dict)
    holds: dict[str, int] = field(default_factory=dict)
    num_checks: int = 0
    num_rollbacks: int = 0
    num_held: int = 0
    passed_at: int | None = None
    judged_at: int | None = None
    is_good_at_end: bool = True


class RewardCheck:
    """
    A running best, a tolerance and a step size.

    After an update the reward is measured: below the running best by more than the tolerance, the update must be taken
    back. Then `HOLD_UPDATES` updates are left out, and the next step is half as large; each update that stays makes it
    larger again. Before an update it is measured too, if training has gone on for more than `VOUCH_STEPS` steps since
    it was last found good, or since an update was taken back: below by more than the tolerance, the update is left
    out, and training goes on with the masks as they are. When training ends it is measured once more.

    Every rank of a distributed run must measure the same number, so that all decide the same.

    Args:
        tolerance (`float`): largest fall below the running best, in units of the reward.
        measure (`Callable`): () -> mean reward on the held-out prompts, NaN where no reward was given.
    """

    def __init__(self, tolerance: float, measure: Callable[[], float]) -> None:
        self.tolerance, self.measure = tolerance, measure
        self.state = RewardState()

    def begin(self) -> None:
        """
        Measure the reward before training.

        Raises:
            `ValueError`: if it is not a finite number.
        """
        if not self._is_good():
            raise ValueError(
                f"The reward functions gave {self.state.last} as mean reward of the held-out prompts, and "
                "reward_tolerance needs a finite one to compare with. Return a number for at least one of their "
                "completions, or set reward_tolerance=None."
            )
        self.state.first, self.state.passed_at = self.state.last, 0

    def propose(self, sparsity: float, target: float, step: int, kind: str = "weight") -> float | None:
        """
        The sparsity that the update due now should try; `None`: leave the update out.

        Args:
            sparsity (`float`): where the masks are.
            target (`float`): what the schedule asks for.
            step (`int`): the optimizer step that has been taken.
            kind (`str`, *optional*, defaults to `"weight"`): of what is pruned; each has its own holds and steps.
        """
        state = self.state
        hold = state.holds.get(kind, 0)
        if hold > 0 or not self._has_held(step):
            state.holds[kind] = max(0, hold - 1)
            state.num_held += 1
            return None
        return min(target, sparsity + state.step_limits[kind]) if kind in state.step_limits else target

    def _has_held(self, step: int) -> bool:
        """Whether the reward is good before an update, by a measurement if the last one says too little."""
        state = self.state
        if state.passed_at is None or step - state.passed_at > VOUCH_STEPS:
            state.passed_at = step if self._is_good() else None
        return state.passed_at is not None

    def accept(self, step_size: float, step: int, kind: str = "weight", min_step: float = MIN_STEP) -> bool:
        """
        Measure right after an update: whether it may stay.

        Args:
            step_size (`float`): by how much it has raised the sparsity.
            step (`int`): the optimizer step that has been taken.
            kind (`str`, *optional*, defaults to `"weight"`): of what is pruned.
            min_step (`float`, *optional*): smallest step that is tried, if larger than `MIN_STEP`: one unit.
        """
        state = self.state
        if self._is_good():
            state.passed_at = step
            if kind in state.step_limits:
                state.step_limits[kind] *= SPEED_UP
            return True
        state.passed_at = None
        state.num_rollbacks += 1
        state.holds[kind] = HOLD_UPDATES
        state.step_limits[kind] = max(MIN_STEP, min_step, step_size * BACK_OFF)
        return False

    def judge(self, step: int) -> bool:
        """Measure at the end of training, once: whether the reward is within the tolerance of the running best."""
        if self.state.judged_at != step:
            self.state.judged_at, self.state.is_good_at_end = step, self._is_good()
        return self.state.is_good_at_end

    def _is_good(self) -> bool:
        """Measure, and compare with the running best."""
        state = self.state
        state.last = self.measure()
        state.num_checks += 1
        if not math.isfinite(state.last):
            if state.best is not None:
                logger.warning("The reward check got %s from the reward functions: that counts as a fall.", state.last)
            return False
        if state.best is None or state.last > state.best:
            state.best = state.last
        return state.best - state.last <= self.tolerance + ROUNDING

    def state_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return dataclasses.asdict(self.state)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.state = RewardState(**values)
