"""Tests of `mama_hf.checkpoint`."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mama_hf import MamaPruningConfig, __version__
from mama_hf.checkpoint import STATE_NAME, describe, load_state, save_recipe_with, save_state
from mama_hf.pruner import Pruner


MAX_STEPS = 12
MakeModel = Callable[..., PreTrainedModel]


def make_pruner(model: PreTrainedModel, **recipe: Any) -> Pruner:
    config = MamaPruningConfig(**{"start": 2, "end": 8, "update_every": 1, **recipe})
    return Pruner(model, config, torch.optim.AdamW(model.parameters(), lr=1e-2), MAX_STEPS, seed=3)


def train(model: PreTrainedModel, pruner: Pruner, first: int, last: int) -> None:
    """The steps of a trainer, on data that depends on the step alone. Steps 5 to 8 share a batch without a signal."""
    pruner.statistics.attach(model)
    for step in range(first, last + 1):
        if step % 4 == 1:
            pruner.observe_rewards(float(step != 5))
        ids = torch.randint(3, 64, (4, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        pruner.observe()
        pruner.optimizer.step()
        pruner.hold()
        pruner.optimizer.zero_grad()
        pruner.update(step)
    pruner.statistics.detach()


def everything(pruner: Pruner) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, values = pruner.state_dict()
    tensors = {key: value.clone() for key, value in tensors.items()}
    return tensors | {target.name: target.weight.clone() for target in pruner.targets}, values


def assert_same(first: Pruner, second: Pruner) -> None:
    (tensors, values), (others, other_values) = everything(first), everything(second)
    assert tensors.keys() == others.keys()
    assert [key for key in tensors if not torch.equal(tensors[key], others[key])] == []
    assert values == other_values
    for name in ("sparsity", "changed", "has_signal"):
        assert getattr(first, name) == getattr(second, name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint-5"
    path.mkdir()
    return path


@pytest.fixture
def saved(folder: Path, make_model: MakeModel) -> Pruner:
    """A pruner whose state after step 5 lies in `folder`."""
    model = make_model("llama")
    pruner = make_pruner(model, criterion="taylor")
    train(model, pruner, 1, 5)
    save_state(pruner, folder, 5)
    return pruner


@pytest.mark.parametrize("num_steps", [1, 3, 5, 9])
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", {}),
        ("llama", {"criterion": "magnitude", "granularity": "2:4"}),
        ("llama", {"criterion": "movement", "ema_decay": 0.9}),
        ("llama", {"criterion": "random"}),
        ("llama", {"criterion": "fisher", "regrowth": 0.2}),
        ("gpt2", {"criterion": "wanda"}),
        ("mixtral", {"criterion": "displacement"}),
    ],
)
def test_resumed_equals_uninterrupted(
    name: str, recipe: dict[str, Any], num_steps: int, folder: Path, make_model: MakeModel
) -> None:
    """Bit for bit: before the first mask, at it, while the masks change, and after they are frozen."""
    model = make_model(name)
    pruner = make_pruner(model, **recipe)
    train(model, pruner, 1, num_steps)
    save_state(pruner, folder, num_steps)
    resumed_model = copy.deepcopy(model)
    resumed = make_pruner(resumed_model, **recipe)
    resumed.optimizer.load_state_dict(copy.deepcopy(pruner.optimizer.state_dict()))
    load_state(resumed, folder, num_steps)
    assert (resumed.masks is None) == (num_steps < 3)
    assert_same(pruner, resumed)
    train(model, pruner, num_steps + 1, MAX_STEPS)
    train(resumed_model, resumed, num_steps + 1, MAX_STEPS)
    assert_same(pruner, resumed)
    assert pruner.num_pruned == sum(round(0.5 * size) for size in pool_sizes(pruner))


def pool_sizes(pruner: Pruner) -> list[int]:
    if pruner.pools.scope == "global":
        return [pruner.pools.num_units]
    if pruner.pools.scope == "row":
        return [t.num_inputs for t in pruner.targets for _ in range(t.parameter.numel() // t.num_inputs)]
    return [target.parameter.numel() for target in pruner.targets]


def test_the_file(folder: Path, saved: Pruner) -> None:
    """One file, under its final name; masks take a bit a weight; the header is JSON."""
    assert [path.name for path in folder.iterdir()] == [STATE_NAME]
    tensors = load_file(folder / STATE_NAME)
    assert saved.masks is not None
    for target, mask in zip(saved.targets, saved.masks):
        packed = tensors[f"mask.{target.name}"]
        assert (packed.dtype, packed.numel()) == (torch.uint8, -(-mask.numel() // 8))
    with safe_open(folder / STATE_NAME, "pt") as file:
        header = json.loads(file.metadata()["mama"])
    assert header["step"] == 5
    assert header["recipe"] == saved.config.to_dict()


def test_odd_shapes_are_packed(folder: Path, make_model: MakeModel) -> None:
    model = make_model("llama", hidden_size=6, intermediate_size=37, num_attention_heads=1, num_key_value_heads=1)
    pruner = make_pruner(model)
    assert any(target.parameter.numel() % 8 for target in pruner.targets)
    train(model, pruner, 1, 3)
    save_state(pruner, folder, 3)
    resumed = make_pruner(model)
    load_state(resumed, folder, 3)
    assert_same(pruner, resumed)


def test_overwriting(folder: Path, saved: Pruner) -> None:
    save_state(saved, folder, 6)
    assert [path.name for path in folder.iterdir()] == [STATE_NAME]
    load_state(saved, folder, 6)


def test_loading_holds_the_masks(folder: Path, saved: Pruner, make_model: MakeModel) -> None:
    pruner = make_pruner(make_model("llama"), criterion="taylor")
    load_state(pruner, folder, 5)
    assert pruner.masks is not None
    assert pruner.num_pruned > 0
    for target, mask in zip(pruner.targets, pruner.masks):
        assert not bool(target.weight[~mask].any())


# What is refused, with a sentence that helps.


def refused(pruner: Pruner, folder: Path, message: str, step: int = 5) -> str:
    with pytest.raises(ValueError, match=message) as raised:
        load_state(pruner, folder, step)
    assert str(folder / STATE_NAME) in str(raised.value)
    return str(raised.value)


def test_missing(tmp_path: Path, folder: Path, saved: Pruner) -> None:
    (folder / STATE_NAME).rename(tmp_path / "kept")
    assert "resume_from=folder" in refused(saved, folder, "is missing, so pruning can't be resumed")
    for number in (1, 3, 10):
        other = tmp_path / f"checkpoint-{number}"
        other.mkdir()
        if number < 10:
            (other / STATE_NAME).write_bytes((tmp_path / "kept").read_bytes())
    message = refused(saved, folder, "is missing.*newest complete checkpoint")
    assert str(tmp_path / "checkpoint-3") in message  # 10 has no state either


@pytest.mark.parametrize("length", [0, 4, 8, 100, 0.5, -1])
def test_truncated(length: float, folder: Path, saved: Pruner) -> None:
    content = (folder / STATE_NAME).read_bytes()
    cut = round(length * len(content)) if isinstance(length, float) else length
    (folder / STATE_NAME).write_bytes(content[:cut])
    refused(saved, folder, "is damaged or truncated")


@pytest.mark.parametrize("metadata", [None, {"other": "1"}, {"mama": "{"}])
def test_foreign_file(metadata: dict[str, str] | None, folder: Path, saved: Pruner) -> None:
    save_file({"x": torch.zeros(1)}, folder / STATE_NAME, metadata=metadata)
    refused(saved, folder, "is damaged or truncated")


@pytest.mark.parametrize("change", [{"final_sparsity": 0.75}, {"end": 9}, {"criterion": "magnitude", "start": 1}])
def test_other_recipe(change: dict[str, Any], folder: Path, saved: Pruner, make_model: MakeModel) -> None:
    pruner = make_pruner(make_model("llama"), **{"criterion": "taylor", **change})
    message = refused(pruner, folder, "was written with another recipe.*from_pretrained")
    for key, value in change.items():
        assert f"{key} was {getattr(saved.config, key)!r} and is {value!r}" in message
    assert message.count(" was ") == len(change) + 1


@pytest.mark.parametrize("step", [4, 6])
def test_other_step(step: int, folder: Path, saved: Pruner) -> None:
    refused(saved, folder, f"is of step 5, but the trainer resumes at step {step}", step)


@pytest.mark.parametrize(
    "shape",
    [{"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"intermediate_size": 48}, {"hidden_size": 64}],
    ids=str,
)
@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_other_model(criterion: str, shape: dict[str, int], folder: Path, make_model: MakeModel) -> None:
    model = make_model("llama")
    pruner = make_pruner(model, criterion=criterion)
    train(model, pruner, 1, 5)
    save_state(pruner, folder, 5)
    refused(make_pruner(make_model("llama", **shape), criterion=criterion), folder, "does not fit this model")


def test_other_version(folder: Path, saved: Pruner) -> None:
    tensors = load_file(folder / STATE_NAME)
    with safe_open(folder / STATE_NAME, "pt") as file:
        header = json.loads(file.metadata()["mama"])
    save_file(tensors, folder / STATE_NAME, metadata={"mama": json.dumps({**header, "version": 99})})
    refused(saved, folder, "has version 99; mama-hf .* reads 1")


# What a saved model says of itself.


@pytest.mark.parametrize("name", ["llama", "tied-llama", "gpt2"])
def test_saved_model_carries_the_recipe(name: str, tmp_path: Path, make_model: MakeModel) -> None:
    recipe = MamaPruningConfig(final_sparsity=0.25, target_modules=["q_proj"])
    model = make_model(name)
    save_recipe_with(model)
    describe(model, recipe, 0.125)
    model.save_pretrained(tmp_path)
    assert MamaPruningConfig.from_pretrained(tmp_path) == recipe
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.mama == {"recipe": recipe.to_dict(), "sparsity": 0.125, "version": __version__}
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


def test_describe_again(tiny_llama: PreTrainedModel) -> None:
    for sparsity in (0.1, 0.2):
        describe(tiny_llama, MamaPruningConfig(), sparsity)
    assert tiny_llama.config.mama["sparsity"] == 0.2


def test_a_copy_saves_itself(tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    save_recipe_with(tiny_llama)
    describe(tiny_llama, MamaPruningConfig(), 0.5)
    twin = copy.deepcopy(tiny_llama)
    torch.nn.init.zeros_(twin.lm_head.weight)
    twin.save_pretrained(tmp_path)
    assert not bool(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.any())
    assert (tmp_path / "pruning_config.json").is_file()


def test_only_the_main_process_writes(tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    save_recipe_with(tiny_llama)
    describe(tiny_llama, MamaPruningConfig(), 0.5)
    tiny_llama.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "pruning_config.json").exists()


def test_adapter_and_merged_model(tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    model = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["q_proj"]))
    save_recipe_with(model)
    describe(model, MamaPruningConfig(), 0.5)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("adapter", "merged"):
        assert MamaPruningConfig.from_pretrained(tmp_path / name) == MamaPruningConfig()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.mama["sparsity"] == 0.5
