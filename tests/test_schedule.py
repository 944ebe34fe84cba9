"""Tests of `mama_hf.schedule`."""

import itertools
from typing import Any

import pytest
import reference

from mama_hf import MamaPruningConfig
from mama_hf.schedule import SCHEDULES, PruningSchedule, resolve_schedule, resolve_step


HUNDREDTHS = [i / 100 for i in range(0, 100, 3)]
RANGES = [(low, high) for low, high in itertools.product(HUNDREDTHS, HUNDREDTHS) if low <= high]


def schedule(shape: str = "cubic", **changes: Any) -> PruningSchedule:
    values = {"start": 10, "end": 50, "initial_sparsity": 0.1, "final_sparsity": 0.8, "update_every": 1}
    return PruningSchedule(shape, **{**values, **changes})


def update_steps(schedule: PruningSchedule, max_steps: int) -> list[int]:
    return [step for step in range(1, max_steps + 1) if schedule.is_update(step)]


@pytest.mark.parametrize("shape", SCHEDULES)
def test_equals_reference(shape: str) -> None:
    for step in range(70):
        expected = reference.sparsity(shape, step, 10, 50, 0.1, 0.8)
        assert schedule(shape).sparsity(step) == pytest.approx(expected, rel=1e-12), step


@pytest.mark.parametrize("shape", SCHEDULES)
def test_both_ends_are_exact(shape: str) -> None:
    for initial, final in RANGES:
        one = schedule(shape, initial_sparsity=initial, final_sparsity=final)
        assert one.sparsity(9) == 0.0
        assert one.sparsity(10) == (final if shape == "one-shot" else initial)
        assert one.sparsity(50) == one.sparsity(51) == one.sparsity(10**9) == final
        assert one.sparsity(one.final_step) == final


@pytest.mark.parametrize("shape", SCHEDULES)
def test_is_monotone(shape: str) -> None:
    for initial, final in RANGES:
        one = schedule(shape, initial_sparsity=initial, final_sparsity=final)
        values = [one.sparsity(step) for step in range(60)]
        assert values == sorted(values), (initial, final)


def test_start_at_end() -> None:
    one = schedule(start=20, end=20)
    assert [one.sparsity(19), one.sparsity(20)] == [0.0, 0.8]
    assert update_steps(one, 100) == [20]


@pytest.mark.parametrize(("every", "expected"), [(10, [10, 20, 30, 40, 50]), (15, [10, 25, 40, 50]), (99, [10, 50])])
def test_updates_end_with_the_freeze(every: int, expected: list[int]) -> None:
    assert update_steps(schedule(update_every=every), 200) == expected


def test_one_shot_updates_once() -> None:
    assert update_steps(schedule("one-shot"), 200) == [10]
    assert schedule("one-shot").final_step == 10
    assert schedule("cubic").final_step == 50


@pytest.mark.parametrize(
    ("value", "max_steps", "expected"),
    [(0, 100, 0), (20, 100, 20), (0.1, 100, 10), (1.0, 7, 7), (1, 7, 1), (0.7, 33, 23)],
)
def test_resolve_step(value: int | float, max_steps: int, expected: int) -> None:
    assert resolve_step(value, max_steps) == expected


@pytest.mark.parametrize("max_steps", [1, 2, 3, 7, 10, 39, 67, 100, 101, 997, 3000, 100_000])
def test_number_of_updates(max_steps: int) -> None:
    one = resolve_schedule(MamaPruningConfig(), max_steps)
    updates = update_steps(one, max_steps)
    span = one.end - one.start
    assert updates[0] == one.start
    assert updates[-1] == one.end <= max_steps
    assert len(updates) == span + 1 if span < 40 else 27 <= len(updates) <= 61
    if max_steps >= 3000:
        assert 38 <= len(updates) <= 43


def test_update_every_is_respected() -> None:
    one = resolve_schedule(MamaPruningConfig(start=5, end=41, update_every=9), 50)
    assert update_steps(one, 50) == [5, 14, 23, 32, 41]


@pytest.mark.parametrize(("max_steps", "every"), [(20, 2), (100, 2), (150, 2), (1000, 15)])
def test_updates_with_a_reward_check_are_apart(max_steps: int, every: int) -> None:
    one = resolve_schedule(MamaPruningConfig(reward_tolerance=0.1), max_steps)
    assert one.update_every == every
    assert resolve_schedule(MamaPruningConfig(reward_tolerance=0.1, update_every=1), max_steps).update_every == 1


def test_fields_come_from_the_recipe() -> None:
    recipe = MamaPruningConfig(final_sparsity=0.6, initial_sparsity=0.2, schedule="linear", start=3, end=0.5)
    one = resolve_schedule(recipe, 40)
    assert one == PruningSchedule("linear", 3, 20, 0.2, 0.6, 1)


def test_start_0_is_the_first_step() -> None:
    one = resolve_schedule(MamaPruningConfig(start=0, end=0), 10)
    assert (one.start, one.end) == (1, 1)


@pytest.mark.parametrize("alignment", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("shape", SCHEDULES)
@pytest.mark.parametrize(("start", "end"), [(0.1, 0.7), (1, 200), (33, 34), (0, 0), (0.5, 1.0)])
def test_alignment(alignment: int, shape: str, start: int | float, end: int | float) -> None:
    recipe = MamaPruningConfig(schedule=shape, start=start, end=end)
    one = resolve_schedule(recipe, 200, alignment)
    updates = update_steps(one, 200)
    assert updates
    assert all(step % alignment == 0 for step in updates)
    assert one.start >= resolve_step(start, 200)
    assert one.end <= max(one.start, resolve_step(end, 200))
    assert one.sparsity(updates[-1]) == 0.5


@pytest.mark.parametrize(
    ("start", "end", "max_steps", "alignment", "message"),
    [
        (1, 101, 100, 1, r"ends at step 101 \(end=101\).*max_steps=100.*half-pruned.*at most 100 or train.*101"),
        (80, 0.7, 100, 1, r"starts at step 80 \(start=80\) and ends before it, at 70 \(end=0.7\)"),
        (0.9, 50, 100, 1, r"starts at step 90 \(start=0.9\) and ends before it, at 50 \(end=50\)"),
        (0.1, 0.7, 0, 1, "max_steps=0"),
        (0.1, 0.7, -1, 1, "max_steps=-1"),
        (97, 98, 100, 16, r"every 16 steps.*start=97 is 112, beyond max_steps=100"),
    ],
)
def test_errors(start: int | float, end: int | float, max_steps: int, alignment: int, message: str) -> None:
    recipe = MamaPruningConfig(start=start, end=end)
    with pytest.raises(ValueError, match=message):
        resolve_schedule(recipe, max_steps, alignment)
