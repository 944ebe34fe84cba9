"""Neurons and heads in training: exact counts, zeros that hold, families, criteria, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILY_MODELS, make_family, random_ids
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer

from mama_hf import CRITERIA, MamaPruningCallback, MamaPruningConfig, sparsity_report
from mama_hf.coupling import find_coupled_groups
from mama_hf.groups import alive, members_of
from mama_hf.pruner import Pruner


def recipe(**changes: Any) -> MamaPruningConfig:
    values = {
        "final_sparsity": 0.5,
        "granularity": "neuron",
        "multiple_of": 4,
        "start": 1,
        "end": 4,
        "update_every": 1,
    }
    return MamaPruningConfig(**{**values, **changes})


def train(model: PreTrainedModel, config: MamaPruningConfig, steps: int = 6) -> Pruner:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model.train(), config, optimizer, steps)
    pruner.attach(model)
    for step in range(1, steps + 1):
        ids = random_ids(4, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.hold()
        optimizer.zero_grad()
        pruner.update(step)
    pruner.detach()
    return pruner


def kept(model: PreTrainedModel, granularity: str = "neuron") -> list[Tensor]:
    return [alive(group) for group in find_coupled_groups(model, granularity)]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_family_loses_exactly_what_is_asked_for(name: str, scope: str) -> None:
    """With biases, in fused and transposed layouts, while the optimizer goes on after the last update."""
    model = make_family(name)
    pruner = train(model, recipe(granularity="neuron+head", scope=scope))
    counts: dict[str, list[int]] = {"neuron": [], "head": []}
    for group in find_coupled_groups(model, "neuron+head"):
        counts[group.kind].append(int(alive(group).sum()))
    assert sum(counts["neuron"]) == 24
    assert sum(counts["head"]) == 4
    assert all(count % 4 == 0 and count > 0 for count in counts["neuron"])
    assert min(counts["head"]) > 0
    if scope == "layer":
        assert counts == {"neuron": [12, 12], "head": [2, 2]}
    assert pruner.sparsity == 0.5
    assert all(torch.equal(mask, live) for mask, live in zip(pruner.masks or [], kept(model, "neuron+head")))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_masks_equal_a_naive_reference(criterion: str) -> None:
    """Sum of the entries' scores over gate rows, up rows and down columns, one update."""
    model = make_family("llama")
    config = recipe(criterion=criterion, scope="layer", schedule="one-shot", start=2, multiple_of=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model.train(), config, optimizer, 4, seed=3)
    pruner.attach(model)
    for step in (1, 2):
        ids = random_ids(4, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        pruner.observe()
        optimizer.step()
        optimizer.zero_grad()
    scores = {target.name: pruner._score(index, 2) for index, target in enumerate(pruner.targets)}
    assert pruner.update(2)
    for layer, mask in enumerate(pruner.masks or []):
        prefix = f"model.layers.{layer}.mlp"
        totals = [
            float(
                scores[f"{prefix}.gate_proj.weight"][neuron].sum()
                + scores[f"{prefix}.up_proj.weight"][neuron].sum()
                + scores[f"{prefix}.down_proj.weight"][:, neuron].sum()
            )
            for neuron in range(24)
        ]
        best = sorted(range(24), key=lambda neuron: -totals[neuron])[:12]
        assert mask.nonzero().flatten().tolist() == sorted(best)


def test_mama_is_not_magnitude() -> None:
    first, second = make_family("llama"), make_family("llama")
    train(first, recipe(scope="layer"))
    train(second, recipe(scope="layer", criterion="magnitude"))
    assert any(not torch.equal(a, b) for a, b in zip(kept(first), kept(second)))


def test_momentum_of_removed_neurons_is_zero() -> None:
    model = make_family("gpt2")
    pruner = train(model, recipe())
    for target, mask in zip(pruner.pools.held, pruner.pools.expand(pruner.masks or [])):
        assert not pruner.optimizer.state[target.parameter]["exp_avg"][~mask].any()
        assert not target.parameter[~mask].any()
    assert any(target.parameter.ndim == 1 for target in pruner.pools.held)


@pytest.mark.parametrize(("move", "name"), [("bias", "gpt2"), ("least_squares", "llama-tied"), ("mean", "llama-tied")])
def test_values_move(move: str, name: str) -> None:
    plain, moved = make_family(name), make_family(name)
    settings = {"criterion": "magnitude", "scope": "layer", "schedule": "one-shot", "start": 2, "end": 2}
    first = train(plain, recipe(**settings), steps=2)
    second = train(moved, recipe(**settings, move_values=move), steps=2)
    assert all(torch.equal(a, b) for a, b in zip(first.masks or [], second.masks or []))
    changed = {key for key, value in plain.state_dict().items() if not torch.equal(value, moved.state_dict()[key])}
    writers = {group.name for group in find_coupled_groups(plain, "neuron")}
    assert changed == {f"{writer}.{'bias' if move == 'bias' else 'weight'}" for writer in writers}


def test_a_bias_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"move_values='bias'.*down_proj"):
        train(make_family("qwen2"), recipe(move_values="bias"))


def test_a_pruned_model_is_held() -> None:
    model = make_family("opt")
    train(model, recipe(granularity="neuron+head"))
    before = kept(model, "neuron+head")
    pruner = train(model, recipe(granularity="neuron+head"))
    assert pruner.is_final(0)
    assert all(torch.equal(a, b) for a, b in zip(before, kept(model, "neuron+head")))
    assert not Pruner(model, recipe(final_sparsity=0.75), pruner.optimizer, 6).is_final(0)


def test_zero_neurons_do_not_stand_for_heads() -> None:
    model = make_family("llama")
    train(model, recipe(final_sparsity=0.8))  # more zero groups than half of the neurons and heads
    pruner = Pruner(model, recipe(granularity="neuron+head"), torch.optim.SGD(model.parameters()), 6)
    assert not pruner.is_final(0)


def test_excluded_and_frozen_layers_stay() -> None:
    model = make_family("llama")
    train(model, recipe(exclude_modules=["layers.0.mlp.up_proj"]))
    assert [int(live.sum()) for live in kept(model)] == [24, 12]
    model = make_family("llama")
    model.model.layers[1].mlp.gate_proj.bias.requires_grad_(False)
    train(model, recipe())
    assert [int(live.sum()) for live in kept(model)] == [12, 24]
    with pytest.raises(ValueError, match=r"No neuron can be pruned: exclude_modules=\['down_proj'\]"):
        train(model, recipe(exclude_modules=["down_proj"]))


def test_what_can_not_be_pruned_is_refused() -> None:
    adapted = get_peft_model(make_family("llama"), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        Pruner(adapted, recipe(), torch.optim.SGD(adapted.parameters()), 6)


def test_report_logs_and_config_count_groups(
    make_dataset: Callable, training_arguments: Callable, tmp_path: Path
) -> None:
    model, args = make_family("llama"), training_arguments(max_steps=6)
    callback = MamaPruningCallback(recipe(granularity="neuron+head"))
    trainer = Trainer(model, args, train_dataset=make_dataset(), callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert model.config.mama["sparsity"] == 0.5
    assert trainer.state.log_history[5]["pruning/sparsity"] == 0.5
    expected = {
        "neuron": {"zeros": 24, "groups": 48, "sparsity": 0.5},
        "head": {"zeros": 4, "groups": 8, "sparsity": 0.5},
    }
    assert sparsity_report(model)["groups"] == sparsity_report(tmp_path / "saved")["groups"] == expected
    assert "neurons" in str(sparsity_report(model))
    assert all(live.any() for group in find_coupled_groups(model, "neuron") for live in [alive(group)])
    assert sum(len(members_of(group)) for group in find_coupled_groups(model, "neuron")) == 10
