"""Tests of `mama_hf.statistics`."""

from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn

from mama_hf import MamaPruningConfig
from mama_hf.criteria import CRITERIA, score
from mama_hf.statistics import DEFAULT_EMA_DECAY, Statistics
from mama_hf.targets import Target, find_targets


GRADIENT_STATISTICS = ("gradient_square", "movement", "taylor", "fisher")


@pytest.fixture
def targets() -> list[Target]:
    torch.manual_seed(0)
    return find_targets(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), MamaPruningConfig())


def set_gradients(targets: list[Target], step: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for target in targets:
        drawn = torch.randn(target.parameter.shape, generator=generator)
        target.parameter.grad = (drawn * factor).to(target.parameter.dtype)


def run(statistics: Statistics, num_steps: int, factors: tuple[float, ...] = (1.0,)) -> None:
    """Steps with a random gradient times a factor, each followed by a change of the weights."""
    for step in range(num_steps):
        set_gradients(statistics.targets, step, factors[step % len(factors)])
        statistics.observe()
        move(statistics.targets, step)


def move(targets: list[Target], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for target in targets:
        target.parameter.data += 0.1 * torch.randn(target.parameter.shape, generator=generator)


def read(statistics: Statistics, name: str) -> list[Tensor]:
    return [statistics.read(name, index, None, step=1) for index in range(len(statistics.targets))]


def snapshot(statistics: Statistics) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in statistics.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [None, 0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", GRADIENT_STATISTICS)
def test_equals_reference(name: str, decay: float | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    targets = find_targets(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).to(dtype), MamaPruningConfig())
    statistics = Statistics(targets, (name,), decay)
    gradients, weights = [], []
    for step in range(5):
        set_gradients(targets, step, factor=10.0**step)
        gradients.append([reference.array(target.gradient) for target in targets])
        weights.append([reference.array(target.weight) for target in targets])
        statistics.observe()
        move(targets, step)
    used = DEFAULT_EMA_DECAY if decay is None and name == "gradient_square" else decay
    for value, expected in zip(read(statistics, name), reference.statistic(name, gradients, weights, used)):
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-4, atol=1e-7)
    assert (int(statistics.num_steps), int(statistics.num_skipped)) == (5, 0)


def test_only_what_is_named_is_collected(targets: list[Target]) -> None:
    statistics = Statistics(targets, ("movement",))
    run(statistics, 2)
    assert set(statistics.accumulators) == {"movement"}
    assert set(statistics.state_dict()) == {"num_steps", "num_skipped", "movement.0.weight", "movement.1.weight"}


def test_initial_weight_stays(targets: list[Target]) -> None:
    before = [target.weight.clone() for target in targets]
    statistics = Statistics(targets, ("initial_weight",))
    run(statistics, 3)
    for value, target, initial in zip(read(statistics, "initial_weight"), targets, before):
        assert torch.equal(value, initial)
        assert not torch.equal(value, target.weight)


# Clipping, and gradients that don't count.


@pytest.mark.parametrize(
    ("factors", "exact"), [((0.5, 4.0, 0.0625), True), ((0.3, 17.0, 1e-3), False), ((1e-6, 1e6), False)]
)
def test_any_factor_of_a_step_cancels(factors: tuple[float, ...], exact: bool) -> None:
    results = []
    for scaled in ((1.0,), factors):
        torch.manual_seed(0)
        targets = find_targets(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), MamaPruningConfig())
        statistics = Statistics(targets, GRADIENT_STATISTICS)
        run(statistics, 6, scaled)
        results.append(statistics.state_dict())
    plain, clipped = results
    for key in plain:
        torch.testing.assert_close(clipped[key], plain[key], rtol=0 if exact else 1e-5, atol=0 if exact else 1e-7)


def test_clip_grad_norm(targets: list[Target]) -> None:
    plain, clipped = (Statistics(targets, GRADIENT_STATISTICS) for _ in range(2))
    for step in range(4):
        set_gradients(targets, step, factor=3.0 + step)
        plain.observe()
        norm = nn.utils.clip_grad_norm_([target.parameter for target in targets], 1.0)
        assert norm > 2
        clipped.observe()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(clipped.state_dict()[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("value", "num_skipped"), [(0.0, 0), (torch.nan, 1), (torch.inf, 1), (-torch.inf, 1)], ids=str
)
@pytest.mark.parametrize("everywhere", [False, True])
def test_gradients_without_a_signal(targets: list[Target], value: float, num_skipped: int, everywhere: bool) -> None:
    """All zero, all non-finite or one entry non-finite: the step leaves no trace but a count."""
    statistics = Statistics(targets, GRADIENT_STATISTICS)
    run(statistics, 3)
    before = snapshot(statistics)
    set_gradients(targets, 9)
    for target in targets:
        if everywhere or value == 0:
            target.parameter.grad = torch.full_like(target.parameter, value)
    if not everywhere and value != 0:
        targets[1].parameter.grad[0, 0] = value
    statistics.observe()
    after = snapshot(statistics)
    assert int(after.pop("num_skipped")) == int(before.pop("num_skipped")) + num_skipped == num_skipped
    assert_same(before, after)
    assert int(after["num_steps"]) == 3
    set_gradients(targets, 10)
    statistics.observe()
    assert int(statistics.num_steps) == 4
    assert all(bool(tensor.isfinite().all()) for tensor in statistics.state_dict().values())


def test_a_target_without_a_gradient_is_left_out(targets: list[Target]) -> None:
    statistics = Statistics(targets, ("taylor",))
    set_gradients(targets, 0)
    targets[0].parameter.grad = None
    statistics.observe()
    first, second = read(statistics, "taylor")
    assert not bool(first.any())
    gradient = targets[1].gradient
    torch.testing.assert_close(second, (targets[1].weight * gradient / gradient.norm()).abs())
    targets[1].parameter.grad = None
    statistics.observe()
    assert int(statistics.num_steps) == 1


def test_gradients_are_not_changed(targets: list[Target]) -> None:
    set_gradients(targets, 0)
    before = [target.gradient.clone() for target in targets]
    Statistics(targets, GRADIENT_STATISTICS).observe()
    assert all(torch.equal(target.gradient, gradient) for target, gradient in zip(targets, before))


def test_a_score_is_a_new_tensor(targets: list[Target]) -> None:
    """What is read may be the accumulator itself: a score that is changed in place must not change it."""
    for name, criterion in CRITERIA.items():
        statistics = Statistics(targets, criterion.statistics)
        run(statistics, 2)
        before = snapshot(statistics)
        weights = [target.weight.clone() for target in targets]
        for index, target in enumerate(targets):
            values = {key: statistics.read(key, index, None, 1) for key in criterion.statistics}
            score(name, target.weight, values).fill_(7.0)
        assert_same(before, snapshot(statistics))
        assert all(torch.equal(target.weight, weight) for target, weight in zip(targets, weights))


# Adam's second moment.


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adam])
def test_adam_is_read_without_memory(targets: list[Target], optimizer_class: type[torch.optim.Optimizer]) -> None:
    optimizer = optimizer_class([target.parameter for target in targets], lr=1e-2)
    statistics = Statistics(targets, ("gradient_square",), adam=True)
    assert statistics.accumulators == {"gradient_square": [None, None]}
    assert not bool(statistics.read("gradient_square", 0, optimizer, 1).any())  # before the first step
    for step in range(3):
        set_gradients(targets, step)
        statistics.observe()
        optimizer.step()
    assert set(statistics.state_dict()) == {"num_steps", "num_skipped"}
    for index, target in enumerate(targets):
        value = statistics.read("gradient_square", index, optimizer, 1)
        assert torch.equal(value, optimizer.state[target.parameter]["exp_avg_sq"])
        assert bool(value.any())


@pytest.mark.parametrize(("decay", "adam"), [(0.9, True), (None, False)])
def test_adam_is_not_read(targets: list[Target], decay: float | None, adam: bool) -> None:
    statistics = Statistics(targets, ("gradient_square",), decay, adam=adam)
    run(statistics, 1)
    assert all(bool(value.any()) for value in read(statistics, "gradient_square"))


def test_adam_moments_serve_beside_other_statistics(targets: list[Target]) -> None:
    statistics = Statistics(targets, ("taylor", "gradient_square"), adam=True)
    run(statistics, 2)
    assert set(statistics.state_dict()) == {"num_steps", "num_skipped", "taylor.0.weight", "taylor.1.weight"}
    assert int(statistics.num_steps) == 2


# Inputs.


def batch(seed: int, padding: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(3, 7, dtype=torch.int64)
    if padding == "right":
        mask[0, 4:], mask[2, 6:] = 0, 0
    elif padding == "left":
        mask[0, :2], mask[1, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_input_norm_without_padding(name: str, padding: str, make_model: Callable[..., nn.Module]) -> None:
    model = make_model(name)
    targets = find_targets(model, MamaPruningConfig(criterion="wanda"))
    statistics = Statistics(targets, ("input_norm",))
    statistics.attach(model)
    seen: list[list[np.ndarray]] = [[] for _ in targets]
    for target, inputs in zip(targets, seen):
        target.module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(reference.array(args[0])))
    batches = [batch(seed, padding) for seed in range(2)]
    for each in batches:
        model(**each)
    masks = [each["attention_mask"].numpy() for each in batches]
    for index, (target, inputs) in enumerate(zip(targets, seen)):
        value = statistics.read("input_norm", index, None, 1)
        expected = reference.input_norm(list(zip(inputs, masks)))
        np.testing.assert_allclose(value.flatten().numpy(), expected, rtol=1e-4)
        assert (target.weight * value).shape == target.weight.shape
        assert value.numel() == target.num_inputs


def test_input_norm_without_a_mask_counts_every_token(tiny_llama: nn.Module) -> None:
    values = []
    for mask in ({}, {"attention_mask": torch.ones(3, 7, dtype=torch.int64)}):
        statistics = Statistics(find_targets(tiny_llama, MamaPruningConfig()), ("input_norm",))
        statistics.attach(tiny_llama)
        tiny_llama(input_ids=batch(0, "none")["input_ids"], **mask)
        statistics.detach()
        values.append(read(statistics, "input_norm")[0])
    assert torch.equal(*values)
    assert bool(values[0].all())


@pytest.mark.parametrize("silent", ["eval", "no_grad", "inference_mode"])
def test_evaluation_and_generation_do_not_count(silent: str, tiny_llama: nn.Module) -> None:
    statistics = Statistics(find_targets(tiny_llama, MamaPruningConfig()), ("input_norm",))
    statistics.attach(tiny_llama)
    tiny_llama(**batch(0, "right"))
    before = snapshot(statistics)
    tiny_llama.train(silent != "eval")
    context = {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with context[silent]():
        tiny_llama(**batch(1, "right"))
    assert_same(before, snapshot(statistics))
    tiny_llama.train()
    tiny_llama(**batch(1, "right"))
    assert not torch.equal(before[f"input_norm.{statistics.targets[0].name}"], read(statistics, "input_norm")[0])


@pytest.mark.parametrize("name", ["input_norm", "gradient_square"])
def test_hooks_are_removed(name: str, tiny_llama: nn.Module) -> None:
    def num_hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tiny_llama.modules())

    targets = find_targets(tiny_llama, MamaPruningConfig())
    statistics = Statistics(targets, (name,))
    statistics.attach(tiny_llama)
    assert num_hooks() == (len(targets) + 1 if name == "input_norm" else 0)
    tiny_llama(**batch(0, "none"))
    before = snapshot(statistics)
    statistics.detach()
    assert num_hooks() == 0
    tiny_llama(**batch(1, "none"))
    assert_same(before, snapshot(statistics))


# Noise and state.


def test_noise_depends_on_seed_step_and_target_alone(tiny_llama: nn.Module) -> None:
    targets = find_targets(tiny_llama, MamaPruningConfig())

    def noise(seed: int, step: int, index: int) -> Tensor:
        torch.rand(seed + step)  # the global generator plays no part
        return Statistics(targets, ("noise",), seed=seed).read("noise", index, None, step)

    assert torch.equal(noise(0, 1, 0), noise(0, 1, 0))
    assert targets[0].weight.shape == targets[3].weight.shape
    for other in ((1, 1, 0), (0, 2, 0), (0, 1, 3)):
        assert not torch.equal(noise(0, 1, 0), noise(*other))


def test_state_round_trip(targets: list[Target]) -> None:
    names = (*GRADIENT_STATISTICS, "initial_weight", "input_norm")
    first, second = Statistics(targets, names), Statistics(targets, names)
    run(first, 3)
    set_gradients(targets, 0, torch.nan)
    first.observe()
    second.load_state_dict(snapshot(first))
    assert_same(snapshot(first), snapshot(second))
    for each in (first, second):
        set_gradients(targets, 7)
        each.observe()
    assert_same(snapshot(first), snapshot(second))
    assert (int(second.num_steps), int(second.num_skipped)) == (4, 1)


@pytest.mark.parametrize("missing", ["num_steps", "num_skipped", "taylor.1.weight"])
def test_missing_state(missing: str, targets: list[Target]) -> None:
    statistics = Statistics(targets, ("taylor",))
    state = snapshot(statistics)
    del state[missing]
    with pytest.raises(KeyError, match=missing):
        statistics.load_state_dict(state)
