"""Neurons and heads in `prune_model`: every family, exact counts, the solver against a naive one, resuming."""

from typing import Any

import pytest
import torch
from families import FAMILY_MODELS, make_family, random_ids
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel

import mama_hf.engine as engine
from mama_hf import MamaPruningConfig, prune_model
from mama_hf.coupling import find_coupled_groups
from mama_hf.groups import alive
from mama_hf.solvers import Moments, System
from mama_hf.structured import choose_groups, fit_columns


def recipe(**changes: Any) -> MamaPruningConfig:
    values = {"final_sparsity": 0.5, "granularity": "neuron", "multiple_of": 4, "move_values": "least_squares"}
    return MamaPruningConfig(**{**values, **changes})


def batches() -> list[Any]:
    padded = {"input_ids": random_ids(8, 24, seed=7), "attention_mask": torch.ones(8, 24, dtype=torch.long)}
    padded["attention_mask"][0, :5] = 0
    return [random_ids(32, 24, seed=5), padded]


def prune(model: PreTrainedModel, **changes: Any) -> Any:
    return prune_model(model, recipe(**changes), batches(), progress=False)


def error(name: str, **changes: Any) -> float:
    """Relative error of the logits on the calibration's tokens."""
    model, ids = make_family(name), batches()[0]
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        prune(model, **changes)
        return float((model(input_ids=ids).logits - dense).norm() / dense.norm())


def kept(model: PreTrainedModel, granularity: str = "neuron") -> list[list[bool]]:
    return [alive(group).tolist() for group in find_coupled_groups(model, granularity)]


def same(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    return all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_family(name: str) -> None:
    """Exact counts; what is outside of the groups stays as it is."""
    model, dense = make_family(name), make_family(name)
    report = prune(model, granularity="neuron+head")
    groups = find_coupled_groups(model, "neuron+head")
    assert [sum(row) for row in kept(model, "neuron+head")] == [g.num_groups // 2 for g in groups]
    assert report.sparsity == model.config.mama["sparsity"] == 0.5
    assert list(report["layers"]) == [g.writers[0].name for layer in (0, 1) for g in _in_order(groups, layer)]
    for row in report["layers"].values():
        assert row["error"] <= row["error_before"]
    members = {member.name for group in groups for member in (*group.readers, *group.writers)}
    for key, value in model.state_dict().items():
        assert key in members or torch.equal(value, dense.state_dict()[key])
    for group, other in zip(groups, find_coupled_groups(dense, "neuron+head")):
        for reader, original in zip(group.readers, other.readers):
            rows = reader.index[alive(group)].flatten()
            assert torch.equal(*(m.parameter.index_select(m.dim, rows) for m in (reader, original)))


def _in_order(groups: list[Any], layer: int) -> list[Any]:
    """The pruning runs through a layer as its forward does: heads, then neurons."""
    return sorted((group for group in groups if group.layer == layer), key=lambda group: group.kind)


@pytest.mark.parametrize("granularity", ["neuron", "head"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_moving_is_better_than_not(name: str, granularity: str) -> None:
    settings = {"granularity": granularity}
    still = error(name, criterion="wanda", move_values="none", **settings)
    moved = error(name, criterion="wanda", **settings)
    assert moved < still
    assert error(name, **settings) < still


def test_the_input_says_more_than_the_weight_norm() -> None:
    settings = {"move_values": "none", "final_sparsity": 0.25}
    weight = sum(error(name, criterion="magnitude", **settings) for name in ("llama", "qwen2", "gpt2", "opt"))
    activation = sum(error(name, criterion="mama", **settings) for name in ("llama", "qwen2", "gpt2", "opt"))
    assert activation < weight


@pytest.mark.parametrize("move", ["none", "mean", "bias", "least_squares"])
@pytest.mark.parametrize("criterion", ["mama", "wanda", "magnitude", "random"])
def test_every_rule(criterion: str, move: str) -> None:
    model = make_family("llama")
    prune(model, criterion=criterion, move_values=move, granularity="neuron+head")
    assert [sum(row) for row in kept(model, "neuron+head")] == [12, 2, 12, 2]


def test_global_scope_lets_layers_differ() -> None:
    model = make_family("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, :16] *= 0.01  # most of layer 0 says little
    report = prune(model, scope="global")
    counts = [sum(row) for row in kept(model)]
    assert sum(counts) == 24
    assert 0 < counts[0] < counts[1]
    assert report.sparsity == 0.5


def test_multiple_of_rounds_neurons_and_not_heads() -> None:
    model = make_family("llama")
    prune(model, multiple_of=8, final_sparsity=0.3, granularity="neuron+head")
    assert [sum(row) for row in kept(model, "neuron+head")] == [16, 3, 16, 3]


def test_excluded_layers_stay() -> None:
    model = make_family("llama")
    prune(model, exclude_modules=["layers.0.mlp.gate_proj"])
    assert [sum(row) for row in kept(model)] == [24, 12]
    with pytest.raises(ValueError, match=r"exclude_modules=\['mlp.down_proj'\] leaves no neuron"):
        prune(make_family("llama"), exclude_modules=["mlp.down_proj"])


def test_iterations_are_refused() -> None:
    with pytest.raises(ValueError, match="iterations=5 has no use with granularity='neuron'"):
        prune_model(make_family("llama"), recipe(), batches(), iterations=5, progress=False)


def test_an_unknown_family_is_refused_with_the_list() -> None:
    config = CLIPTextConfig(vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"'clip_text_model' are not known\. Known are llama, .*modernbert"):
        prune_model(CLIPTextModel(config), recipe(), batches(), progress=False)


@pytest.mark.parametrize("move", ["least_squares", "bias"])
def test_an_error_changes_nothing_and_a_resumed_run_ends_alike(move: str, tmp_path, monkeypatch) -> None:
    settings = {"granularity": "neuron+head", "scope": "global", "move_values": move}
    whole, model, dense = make_family("gpt2"), make_family("gpt2"), make_family("gpt2")
    prune(whole, **settings)
    original = engine.Engine._prune_one

    def fail(self, module, index, *rest):
        if index == 1 and module is self.blocks[1].mlp.c_proj:
            raise KeyboardInterrupt
        return original(self, module, index, *rest)

    monkeypatch.setattr(engine.Engine, "_prune_one", fail)
    with pytest.raises(KeyboardInterrupt):
        prune_model(model, recipe(**settings), batches(), resume_dir=tmp_path, progress=False)
    assert same(model, dense)
    monkeypatch.undo()
    prune_model(model, recipe(**settings), batches(), resume_dir=tmp_path, progress=False)
    assert same(model, whole)


def problem(num_inputs: int = 12, num_outputs: int = 5) -> tuple[Tensor, Moments]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, num_inputs, generator=generator) @ torch.randn(num_inputs, num_inputs, generator=generator)
    weight = torch.randn(num_outputs, num_inputs, generator=generator)
    y = x @ weight.T + torch.randn(200, num_outputs, generator=generator)
    return weight, Moments(x.T @ x, y.T @ x, y.square().sum(dim=0))


def damping(moments: Moments, share: float, ridge: float) -> Tensor:
    """What draws each column [I] to its old value."""
    diagonal = moments.gram.diagonal()
    return share * diagonal.mean() + ridge * diagonal


def damped_error(weight: Tensor, moments: Moments, start: Tensor, pull: Tensor) -> float:
    return float(moments.square_error(weight).sum() + (pull * (weight - start).square()).sum())


def test_fit_columns_is_the_damped_least_squares_solution() -> None:
    weight, moments = problem()
    system, mask, pull = System(moments.gram, 0.5, 0.2), torch.arange(12) % 3 != 0, damping(moments, 0.5, 0.2)
    values = fit_columns(weight, moments, mask, system)
    columns = mask.nonzero().flatten()
    gram = moments.gram.double() + pull.double().diag()
    right = (moments.cross + pull * weight).double()[:, columns]
    expected = torch.linalg.solve(gram[columns][:, columns], right.T).T.float()
    torch.testing.assert_close(values[:, columns], expected, rtol=1e-3, atol=1e-3)
    assert not values[:, ~mask].any()


@pytest.mark.parametrize("size", [1, 3])
def test_groups_go_as_greedy_refitting_says(size: int) -> None:
    """One group a round: each that goes is the one whose loss, all others refitted, is the smallest."""
    weight, moments = problem()
    system, index = System(moments.gram, 0.01, 0.1), torch.arange(12).view(-1, size)
    left = list(range(len(index)))
    while len(left) > len(index) // 2:
        losses = {}
        for group in left:
            mask = torch.zeros(12, dtype=torch.bool)
            mask[index[[other for other in left if other != group]].flatten()] = True
            losses[group] = damped_error(
                fit_columns(weight, moments, mask, system), moments, weight, damping(moments, 0.01, 0.1)
            )
        left.remove(min(losses, key=losses.__getitem__))
    assert choose_groups(weight, moments, index, len(index) // 2, system).nonzero().flatten().tolist() == left
