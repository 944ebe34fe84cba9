"""The decisions of `RewardCheck`, on rewards that are given."""

import json
import logging
import math
from collections.abc import Iterable

import pytest

from mama_hf.reward_check import BACK_OFF, HOLD_UPDATES, MIN_STEP, SPEED_UP, VOUCH_STEPS, RewardCheck


FAR = 2 * VOUCH_STEPS  # steps between updates, so that the reward is measured before each of them


def check(*rewards: float, tolerance: float = 0.1) -> RewardCheck:
    """A check that measures these rewards, in turn; the first one before training."""
    each = iter(rewards)
    result = RewardCheck(tolerance, lambda: next(each))
    result.begin()
    return result


def test_without_a_fall_the_schedule_is_followed() -> None:
    one = check(0.5, 0.6, 0.6, 0.55, 0.5)
    assert one.propose(0.0, 0.3, FAR) == 0.3
    assert one.accept(0.3, FAR)
    assert one.propose(0.3, 0.6, 2 * FAR) == 0.6  # 0.05 below the best is within the tolerance
    assert one.accept(0.3, 2 * FAR)  # just within
    assert one.state.best == 0.6
    assert (one.state.first, one.state.last, one.state.num_checks) == (0.5, 0.5, 5)
    assert (one.state.num_rollbacks, one.state.num_held, one.state.step_limits) == (0, 0, {})


def test_a_mean_of_fp32_rewards_at_the_tolerance_is_within() -> None:
    one = check(1.0, 1.0, 0.949999988079071, tolerance=0.05)
    one.propose(0.0, 0.1, FAR)
    assert one.accept(0.1, FAR)


def test_a_check_that_was_passed_stands_for_the_next_one() -> None:
    """Unless more than `VOUCH_STEPS` lie between; and none does after an update that was taken back."""
    one = check(1.0, 1.0, 0.0, 1.0, 1.0, 0.0)
    assert one.propose(0.0, 0.1, VOUCH_STEPS) == 0.1
    assert one.state.num_checks == 1
    assert one.accept(0.1, VOUCH_STEPS)
    assert one.propose(0.1, 0.2, 2 * VOUCH_STEPS) == 0.2
    assert not one.accept(0.1, 2 * VOUCH_STEPS)
    assert one.state.num_checks == 3
    for _ in range(HOLD_UPDATES):
        one.propose(0.1, 0.2, 2 * VOUCH_STEPS + 1)
    assert one.propose(0.1, 0.2, 2 * VOUCH_STEPS + 2) is not None
    assert one.state.num_checks == 4
    assert one.accept(0.05, 2 * VOUCH_STEPS + 2)
    assert one.propose(0.15, 0.3, 3 * VOUCH_STEPS + 3) is None
    assert one.state.num_checks == 6


def test_the_end_is_judged_once() -> None:
    one = check(1.0, 0.95, 0.85)
    assert one.judge(5)
    assert one.judge(5)
    assert one.state.num_checks == 2
    assert not one.judge(6)  # training has gone on
    resumed = check(1.0)
    resumed.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert not resumed.judge(6)


def test_a_fall_before_an_update_leaves_it_out_until_training_has_recovered() -> None:
    one = check(1.0, 0.85, 0.8, 0.95, 0.95)
    assert one.propose(0.3, 0.4, FAR) is None
    assert one.propose(0.3, 0.5, FAR + 1) is None
    assert one.state.num_held == 2
    assert one.propose(0.3, 0.6, FAR + 2) == 0.6
    assert one.accept(0.3, FAR + 2)
    assert one.state.num_rollbacks == 0


def test_a_fall_after_an_update_holds_and_then_tries_a_smaller_step() -> None:
    one = check(1.0, 1.0, 0.8, 1.0, 1.0, 1.0, 1.0)
    assert one.propose(0.3, 0.5, FAR) == 0.5
    assert not one.accept(0.2, FAR)
    for _ in range(HOLD_UPDATES):
        assert one.propose(0.3, 0.6, FAR + 1) is None
    assert one.state.num_checks == 3  # none while it holds
    size = 0.2 * BACK_OFF
    assert one.propose(0.3, 0.7, FAR + 2) == pytest.approx(0.3 + size)
    assert one.accept(size, FAR + 2)
    assert one.propose(0.4, 0.7, 2 * FAR) == pytest.approx(0.4 + size * SPEED_UP)
    assert one.accept(size * SPEED_UP, 2 * FAR)
    assert (one.state.num_rollbacks, one.state.num_held) == (1, HOLD_UPDATES)


def test_the_schedule_stays_the_upper_bound() -> None:
    one = check(1.0, 1.0, 0.0, 1.0)
    one.propose(0.0, 0.4, FAR)
    one.accept(0.4, FAR)
    for _ in range(HOLD_UPDATES):
        one.propose(0.0, 0.4, FAR)
    assert one.propose(0.0, 0.05, FAR) == 0.05


def test_steps_do_not_vanish() -> None:
    one = check(1.0, *[1.0, 0.0] * 20)
    size = 0.5
    for _ in range(20):
        proposal = one.propose(0.2, 0.9, FAR)
        while proposal is None:
            proposal = one.propose(0.2, 0.9, FAR)
        size = proposal - 0.2
        assert not one.accept(size, FAR)
    assert size == pytest.approx(MIN_STEP)


def test_a_step_is_at_least_one_unit_and_kinds_hold_apart() -> None:
    one = check(1.0, 1.0, 0.0, 1.0, 1.0, 1.0)
    assert one.propose(0.0, 0.5, FAR, "head") == 0.5
    assert not one.accept(0.25, FAR, "head", min_step=0.25)
    assert one.propose(0.0, 0.5, FAR, "neuron") == 0.5  # heads hold, neurons go on
    assert one.accept(0.5, FAR, "neuron")
    for _ in range(HOLD_UPDATES):
        assert one.propose(0.0, 0.6, FAR, "head") is None
    assert one.propose(0.0, 0.6, FAR, "head") == 0.25


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_no_reward_before_training_is_refused(reward: float) -> None:
    with pytest.raises(ValueError, match=f"gave {reward} as mean reward.*reward_tolerance=None"):
        check(reward)


def test_no_reward_in_mid_run_is_a_fall_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    one = check(1.0, math.nan, 1.0, math.nan)
    with caplog.at_level(logging.WARNING):
        assert one.propose(0.0, 0.1, FAR) is None
        assert one.propose(0.0, 0.1, FAR + 1) == 0.1
        assert not one.accept(0.1, FAR + 1)
    assert [record.getMessage() for record in caplog.records] == [
        "The reward check got nan from the reward functions: that counts as a fall."
    ] * 2
    assert (one.state.best, one.state.num_rollbacks, one.state.num_held) == (1.0, 1, 1)


def decisions(one: RewardCheck, steps: Iterable[int]) -> list[tuple[float | None, bool | None]]:
    sparsity, made = 0.0, []
    for step in steps:
        proposal = one.propose(sparsity, step / 20, step)
        accepted = None if proposal is None else one.accept(proposal - sparsity, step)
        sparsity = proposal if accepted and proposal is not None else sparsity
        made.append((proposal, accepted))
    return made


def test_it_continues_from_its_state_in_the_middle_of_a_hold() -> None:
    def reward(count: int) -> float:
        return 1.0 if count % 7 else 0.5

    full = RewardCheck(0.1, lambda: reward(full.state.num_checks + 1))
    full.begin()
    before = decisions(full, range(1, 8))
    assert full.state.holds["weight"] > 0
    saved = json.loads(json.dumps(full.state_dict()))
    resumed = RewardCheck(0.1, lambda: reward(resumed.state.num_checks + 1))
    resumed.load_state_dict(saved)
    assert decisions(full, range(8, 20)) == decisions(resumed, range(8, 20))
    assert full.state == resumed.state
    assert any(accepted is False for _, accepted in before)
