"""Tests of `mama_hf.values`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn, optim
from transformers import Adafactor, PreTrainedModel

from mama_hf import MamaPruningConfig
from mama_hf.targets import Target, find_targets
from mama_hf.values import apply_masks_, check_optimizer, momenta


# name -> (class, arguments, state that is a running direction)
OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any], set[str]]] = {
    "AdamW": (optim.AdamW, {"weight_decay": 0.1}, {"exp_avg"}),
    "AdamW fused": (optim.AdamW, {"fused": True, "weight_decay": 0.1}, {"exp_avg"}),
    "AdamW foreach": (optim.AdamW, {"foreach": True}, {"exp_avg"}),
    "AdamW amsgrad": (optim.AdamW, {"amsgrad": True}, {"exp_avg"}),
    "Adam": (optim.Adam, {}, {"exp_avg"}),
    "NAdam": (optim.NAdam, {}, {"exp_avg"}),
    "RAdam": (optim.RAdam, {}, {"exp_avg"}),
    "Adamax": (optim.Adamax, {}, {"exp_avg", "exp_inf"}),
    "Adagrad": (optim.Adagrad, {}, set()),
    "Adadelta": (optim.Adadelta, {}, {"acc_delta"}),
    "ASGD": (optim.ASGD, {"t0": 0}, {"ax"}),
    "Rprop": (optim.Rprop, {}, {"prev", "step_size"}),
    "RMSprop": (optim.RMSprop, {}, set()),
    "RMSprop centered": (optim.RMSprop, {"centered": True, "momentum": 0.9}, {"momentum_buffer", "grad_avg"}),
    "SGD": (optim.SGD, {}, set()),
    "SGD momentum": (optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum_buffer"}),
    "SGD nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}, {"momentum_buffer"}),
    "Muon": (optim.Muon, {}, {"momentum_buffer"}),
}
MIXES_ENTRIES = {"Muon"}  # the step of an entry depends on the others


def model_and_optimizer(name: str, dtype: torch.dtype = torch.float32) -> tuple[list[Target], optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Linear(8, 6, bias=False)).to(dtype)
    optimizer_class, arguments, _ = OPTIMIZERS[name]
    return find_targets(model, MamaPruningConfig()), optimizer_class(model.parameters(), lr=0.01, **arguments)


def step(targets: list[Target], optimizer: optim.Optimizer, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for target in targets:
        drawn = torch.randn(target.parameter.shape, generator=generator) * scale
        target.parameter.grad = drawn.to(target.parameter.dtype)
    optimizer.step()


def draw_masks(targets: list[Target]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(target.parameter.shape, generator=generator) < 0.5 for target in targets]


def state_of(optimizer: optim.Optimizer, target: Target) -> dict[str, Tensor]:
    return {key: value for key, value in optimizer.state[target.parameter].items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_reach_weights_and_momenta(name: str, dtype: torch.dtype) -> None:
    """What is kept, and the scales of the step, go as in the run that is not pruned; the rest is exactly zero."""
    targets, optimizer = model_and_optimizer(name, dtype)
    plain_targets, plain = model_and_optimizer(name, dtype)
    masks = draw_masks(targets)
    for seed in range(3):
        step(targets, optimizer, seed)
        apply_masks_(targets, masks, optimizer)
        step(plain_targets, plain, seed)
    for target, mask, other in zip(targets, masks, plain_targets):
        assert not bool(target.weight[~mask].any())
        found, expected = state_of(optimizer, target), state_of(plain, other)
        directions = {key for key, value in found.items() if value.numel() > 1 and not bool(value[~mask].any())}
        assert directions == OPTIMIZERS[name][2]
        assert len(momenta(optimizer, target.parameter)) == len(directions)
        if name in MIXES_ENTRIES:
            continue
        assert torch.equal(target.weight[mask], other.weight[mask])
        for key, value in found.items():
            shown = mask if key in directions else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(value[shown], expected[key][shown]), key


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in MIXES_ENTRIES])
def test_state_never_regrows_a_zero(name: str) -> None:
    """Without a gradient, what is left in the optimizer moves no pruned weight, though nothing masks it again."""
    targets, optimizer = model_and_optimizer(name)
    masks = draw_masks(targets)
    for seed in range(3):
        step(targets, optimizer, seed)
    apply_masks_(targets, masks, optimizer)
    for _ in range(2):
        step(targets, optimizer, 9, scale=0.0)
    assert not any(bool(target.weight[~mask].any()) for target, mask in zip(targets, masks))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_masks_are_applied_in_place(name: str, make_model: Callable[..., PreTrainedModel]) -> None:
    targets = find_targets(make_model(name), MamaPruningConfig())
    before = [target.weight.clone() for target in targets]
    pointers = [target.parameter.data_ptr() for target in targets]
    masks = draw_masks(targets)
    apply_masks_(targets, masks, None)
    for target, mask, weight in zip(targets, masks, before):
        assert torch.equal(target.weight, weight * mask)
    assert [target.parameter.data_ptr() for target in targets] == pointers


def test_lora_sum_is_masked(tiny_llama: PreTrainedModel) -> None:
    model = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules="all-linear"))
    targets = find_targets(model, MamaPruningConfig())
    optimizer = optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    ids = torch.randint(3, 64, (2, 8))
    masks = draw_masks(targets)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        apply_masks_(targets, masks, optimizer)
        assert not any(bool(target.weight[~mask].any()) for target, mask in zip(targets, masks))
    assert all(bool(target.weight[mask].all()) for target, mask in zip(targets, masks))


# Looking at an optimizer before training.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_check_tells_the_state(name: str, dtype: torch.dtype) -> None:
    targets, optimizer = model_and_optimizer(name, dtype)
    found = check_optimizer(optimizer, dtype)
    step(targets, optimizer, 0)
    real = state_of(optimizer, targets[0])
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in real.items()}
    assert {key for key, value in found.items() if value.numel() > 1} == {
        key for key, value in real.items() if value.numel() > 1
    }


def everything(targets: list[Target], optimizer: optim.Optimizer) -> list[Any]:
    return copy.deepcopy([optimizer.state_dict(), [(t.parameter.data, t.parameter.grad) for t in targets]])


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_check_leaves_no_trace(name: str, num_steps: int) -> None:
    targets, optimizer = model_and_optimizer(name)
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for seed in range(num_steps):
        step(targets, optimizer, seed)
        scheduler.step()
    before, keys = everything(targets, optimizer), set(vars(optimizer))
    groups, state = optimizer.param_groups, optimizer.state
    random_state = torch.get_rng_state()
    check_optimizer(optimizer, torch.float32)
    assert same(before, everything(targets, optimizer))
    assert set(vars(optimizer)) == keys
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert torch.equal(random_state, torch.get_rng_state())
    step(targets, optimizer, 7)  # and it still works
    scheduler.step()
    assert not same(before, everything(targets, optimizer))


def test_check_calls_none_of_the_users_hooks() -> None:
    _, optimizer = model_and_optimizer("AdamW")
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: called.append("before"))
    optimizer.register_step_post_hook(lambda *args: called.append("after"))
    check_optimizer(optimizer, torch.float32)
    assert called == []
    optimizer.step()
    assert called == ["before", "after"]


class EightBit(optim.Optimizer):
    """State of one byte a weight, as bitsandbytes keeps it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["state1"] = torch.zeros_like(parameter, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Adafactor, r"Adafactor keeps 'exp_avg_sq_row' as torch\.float32 \(256,\) for a weight of shape \(256, 128\)"),
        (optim.Adafactor, r"Adafactor keeps 'row_var' as torch\.float32 \(256, 1\)"),
        (EightBit, r"EightBit keeps 'state1' as torch\.uint8 \(256, 128\)"),
        (optim.LBFGS, r"LBFGS could not be examined \(.*closure"),
        (optim.SparseAdam, "SparseAdam could not be examined"),
    ],
)
def test_unmaskable_state_is_refused(make: Callable[..., optim.Optimizer], message: str) -> None:
    layer = nn.Linear(4, 4)
    optimizer = make(layer.parameters())
    with pytest.raises(ValueError, match=f"{message}.*(adamw_torch|per-weight)"):
        check_optimizer(optimizer, torch.float32)
    assert not optimizer.state
