"""Value moving in training: what is collected, from which inputs, and what a mask update does with it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mama_hf import MamaPruningConfig
from mama_hf import moving as moving_module
from mama_hf.moving import COLLECT_STEPS, ValueMover
from mama_hf.pruner import Pruner
from mama_hf.targets import Target, find_targets


RULES = ["mean", "bias", "least_squares"]


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (6, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[4, 7:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs_of(model: nn.Module, targets: list[Target], given: dict[str, Tensor]) -> list[Tensor]:
    """The inputs [T, I] of each target's module, without padding, fp64."""
    seen: dict[nn.Module, Tensor] = {}
    hooks = [
        target.module.register_forward_pre_hook(lambda module, args: seen.__setitem__(module, args[0].detach()))
        for target in targets
    ]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    return [seen[target.module][given["attention_mask"].bool()].double() for target in targets]


def collected(model: nn.Module, rule: str, *batches: dict[str, Tensor], **config: Any) -> ValueMover:
    mover = ValueMover(find_targets(model, MamaPruningConfig(**config)), rule)
    mover.attach(model)
    mover.is_collecting = True
    for given in batches:
        model(**given)
    mover.observe()
    mover.detach()
    return mover


def half(targets: list[Target]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(target.parameter.shape, generator=generator) > 0.5 for target in targets]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_each_distinct_input_is_collected_once_and_without_padding(name: str, make_model: Callable) -> None:
    model = make_model(name)
    batches = [batch(0), batch(1)]
    mover = collected(model, "least_squares", *batches)
    distinct = 4  # attention, its output, feed-forward, its inside
    assert len(mover.inputs) == 2 * distinct
    inputs = [torch.cat(parts) for parts in zip(*[inputs_of(model, mover.targets, given) for given in batches])]
    for index, x in enumerate(inputs):
        found = mover.inputs[mover._first[index]]
        found.finish()
        torch.testing.assert_close(found.gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.mean.double(), x.mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_least_squares_brings_the_outputs_closer(name: str, dtype: torch.dtype, make_model: Callable) -> None:
    model = make_model(name).to(dtype)
    mover = collected(model, "least_squares", batch())
    masks, before = half(mover.targets), [target.weight.double().clone() for target in mover.targets]
    inputs = inputs_of(model, mover.targets, batch())
    mover.move_(masks)
    closer = 0
    for target, mask, dense, x in zip(mover.targets, masks, before, inputs):
        assert int(target.weight[~mask].count_nonzero()) == 0
        rows, moved = target.to_rows(dense), target.to_rows(target.weight.double())
        plain = ((x @ (rows * target.to_rows(mask) - rows).T) ** 2).sum(dim=0)
        error = ((x @ (moved - rows).T) ** 2).sum(dim=0)
        assert bool((error <= plain * 1.01 + 1e-6).all())
        closer += int((error < 0.9 * plain).sum())
    assert closer > 100
    mover.forget()
    assert mover.inputs == {}


def test_mean_keeps_the_sum_of_each_row(tiny_llama: LlamaForCausalLM) -> None:
    mover = collected(tiny_llama, "mean", batch())
    sums = [target.weight.sum(dim=1).clone() for target in mover.targets]
    assert mover.inputs == {}
    mover.move_(half(mover.targets))
    for target, total in zip(mover.targets, sums):
        torch.testing.assert_close(target.weight.sum(dim=1), total, rtol=1e-4, atol=1e-5)


def test_bias_keeps_the_mean_output(make_model: Callable) -> None:
    model = make_model("gpt2")
    mover = collected(model, "bias", batch())
    inputs = inputs_of(model, mover.targets, batch())
    outputs = [target.module(x.float()).mean(dim=0) for target, x in zip(mover.targets, inputs)]
    mover.move_(half(mover.targets))
    for target, x, mean in zip(mover.targets, inputs, outputs):
        torch.testing.assert_close(target.module(x.float()).mean(dim=0), mean, rtol=1e-3, atol=1e-5)


def test_displacement_does_not_count_what_was_moved(tiny_llama: LlamaForCausalLM) -> None:
    mover = collected(tiny_llama, "least_squares", batch())
    initial = [target.weight.clone() + 0.5 for target in mover.targets]
    before = [target.weight - start for target, start in zip(mover.targets, initial)]
    masks = half(mover.targets)
    mover.move_(masks, initial)
    for target, start, displaced, mask in zip(mover.targets, initial, before, masks):
        torch.testing.assert_close((target.weight - start)[mask], displaced[mask], rtol=1e-4, atol=1e-5)


def test_inputs_are_collected_only_shortly_before_an_update(tiny_llama: LlamaForCausalLM) -> None:
    recipe = MamaPruningConfig(start=10, end=30, update_every=10, move_values="least_squares")
    pruner = Pruner(tiny_llama, recipe, torch.optim.SGD(tiny_llama.parameters(), lr=0.1), max_steps=40)
    collecting = []
    for step in range(1, 41):  # whether the inputs of `step` count
        collecting += [step] if pruner.mover.is_collecting else []
        pruner.update(step)
    assert collecting == [step for end in (10, 20, 30) for step in range(end - COLLECT_STEPS + 1, end + 1)]


def test_infinite_inputs_move_nothing(tiny_llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    mover = collected(tiny_llama, "least_squares", batch())
    first = min(mover.inputs)
    mover.inputs[first].gram[0, 0] = torch.inf
    before, masks = mover.targets[first].weight.clone(), half(mover.targets)
    mover.move_(masks)
    assert torch.equal(mover.targets[first].weight, before * masks[first])
    assert "NaN or infinite" in caplog.text


@pytest.mark.parametrize(
    ("name", "rule", "reason"),
    [
        ("llama", "bias", "a layer with a bias"),
        ("mixtral", "least_squares", "no experts"),
        ("mixtral", "bias", "a layer with a bias"),
    ],
)
def test_weights_that_can_not_take_values_are_refused(name: str, rule: str, reason: str, make_model: Callable) -> None:
    with pytest.raises(ValueError, match=f"move_values='{rule}' does not work.*{reason}"):
        ValueMover(find_targets(make_model(name), MamaPruningConfig()), rule)


@pytest.mark.parametrize("rule", RULES)
def test_lora_is_refused(tiny_llama: LlamaForCausalLM, rule: str) -> None:
    model = get_peft_model(tiny_llama, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=f"move_values='{rule}' does not work in training.*LoRA"):
        ValueMover(find_targets(model, MamaPruningConfig()), rule)


def test_too_large_gram_matrices_are_refused(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving_module, "GRAM_LIMIT_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"move_values='least_squares' needs more than.*prune_model"):
        collected(tiny_llama, "least_squares", batch())
