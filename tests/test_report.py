"""Tests of `mama_hf.report`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from mama_hf import MamaPruningConfig, sparsity_report
from mama_hf.checkpoint import STATE_NAME, describe
from mama_hf.masks import select
from mama_hf.targets import find_targets


MakeModel = Callable[..., PreTrainedModel]
NAMES = ["llama", "tied-llama", "qwen2", "gpt2", "bert", "mixtral"]


def prune(model: PreTrainedModel, **recipe: Any) -> MamaPruningConfig:
    """By magnitude, and say so in the model's config."""
    config = MamaPruningConfig(**recipe)
    for target in find_targets(model, config):
        rows = target.to_rows(target.weight)
        (mask,) = select([rows.abs()], [rows], config.final_sparsity, "layer", config.n_of_m)
        target.parameter.data *= target.from_rows(mask)
    describe(model, config, config.final_sparsity)
    return config


def count(parameters: list[nn.Parameter]) -> dict[str, Any]:
    """Entry by entry."""
    zeros = sum(1 for parameter in parameters for value in parameter.flatten().tolist() if value == 0)
    size = sum(parameter.numel() for parameter in parameters)
    num_bytes = sum(parameter.numel() * (2 if parameter.dtype == torch.bfloat16 else 4) for parameter in parameters)
    return {"zeros": zeros, "parameters": size, "bytes": num_bytes, "sparsity": zeros / size}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_counts(name: str, dtype: torch.dtype, make_model: MakeModel) -> None:
    model = make_model(name).to(dtype)
    recipe = prune(model, final_sparsity=0.3)
    report = sparsity_report(model)
    parameters = dict(model.named_parameters())
    assert report["total"] == count(list(parameters.values()))
    assert report["total"]["parameters"] == model.num_parameters()
    assert report["layers"].keys() == parameters.keys()
    targets = find_targets(model, recipe)
    assert {key for key, row in report["layers"].items() if row["target"]} == {target.name for target in targets}
    assert report["targets"] == count([target.parameter for target in targets])
    assert report["targets"]["zeros"] == sum(round(0.3 * target.parameter.numel()) for target in targets)
    for key, parameter in parameters.items():
        row = report["layers"][key]
        assert {field: row[field] for field in ("zeros", "parameters", "bytes", "sparsity")} == count([parameter])
        assert row["shape"] == list(parameter.shape)
        assert row["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("name", NAMES)
def test_folder_equals_model(name: str, tmp_path: Path, make_model: MakeModel) -> None:
    model = make_model(name)
    prune(model, final_sparsity=0.5, granularity="2:4")
    model.save_pretrained(tmp_path)
    (tmp_path / STATE_NAME).write_bytes(b"no weights")
    report, stored = sparsity_report(model), sparsity_report(tmp_path)
    assert stored == sparsity_report(str(tmp_path))
    assert stored["total"] == report["total"]
    assert stored["targets"] == report["targets"]
    if name != "mixtral":  # whose experts are one matrix each in the file
        assert {key: stored["layers"][key] for key in report["layers"]} == report["layers"]


def test_shards(tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    prune(tiny_llama)
    tiny_llama.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    report, stored = sparsity_report(tiny_llama), sparsity_report(tmp_path)
    assert (stored["total"], stored["targets"]) == (report["total"], report["targets"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(("granularity", "final"), [("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5), ("unstructured", 0.5)])
def test_pattern_along_the_inputs(name: str, granularity: str, final: float, make_model: MakeModel) -> None:
    model = make_model(name)
    recipe = prune(model, granularity=granularity, final_sparsity=final)
    report = sparsity_report(model)
    expected = None if granularity == "unstructured" else granularity
    assert {report["layers"][target.name]["n_of_m"] for target in find_targets(model, recipe)} == {expected}
    assert all(row["n_of_m"] is None for row in report["layers"].values() if not row["target"])


@pytest.mark.parametrize(
    ("kept", "expected"), [([0], "1:4"), ([0, 1], "2:4"), ([0, 1, 2], None), ([], "1:4"), ([4, 5, 6, 7], "4:8")]
)
def test_strictest_pattern(kept: list[int], expected: str | None) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(16, 3)})
    nn.init.ones_(model["layer"].weight)
    pattern = [float(i in kept or (i - 4 in kept and max(kept) < 4)) for i in range(8)]
    model["layer"].weight.data *= torch.tensor(pattern * 2)
    assert sparsity_report(model)["layers"]["layer.weight"]["n_of_m"] == expected


def test_targets_are_those_of_the_recipe(tiny_llama: PreTrainedModel) -> None:
    dense = sparsity_report(tiny_llama)
    assert sum(row["target"] for row in dense["layers"].values()) == 14
    assert dense["targets"]["zeros"] == 0
    prune(tiny_llama, target_modules=["q_proj"])
    report = sparsity_report(tiny_llama)
    assert {key.split(".")[-2] for key, row in report["layers"].items() if row["target"]} == {"q_proj"}
    assert report["targets"]["sparsity"] == 0.5


def test_model_is_not_changed(tiny_llama: PreTrainedModel) -> None:
    prune(tiny_llama)
    before = {key: value.clone() for key, value in tiny_llama.state_dict().items()}
    sparsity_report(tiny_llama)
    assert all(torch.equal(value, before[key]) for key, value in tiny_llama.state_dict().items())
    assert tiny_llama.training
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())


def test_json_and_table(tiny_llama: PreTrainedModel) -> None:
    prune(tiny_llama, granularity="2:4")
    report = sparsity_report(tiny_llama)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict() == report
    lines = str(report).splitlines()
    (row,) = [line for line in lines if "layers.1.mlp.down_proj.weight" in line]
    for cell in ("32x64", "float32", "1,024", "2,048", "0.5000", "2:4"):
        assert cell in row
    assert not any("embed_tokens" in line for line in lines)
    assert sum("0.5000" in line for line in lines) == 15  # 14 weights and their sum
    assert any("total" in line and f"{report['total']['sparsity']:.4f}" in line for line in lines)


@pytest.mark.parametrize("files", [(), ("config.json",)])
def test_folder_without_weights(files: tuple[str, ...], tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    if files:
        tiny_llama.config.architectures = ["LlamaForCausalLM"]
        tiny_llama.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="There are no safetensors weights"):
        sparsity_report(tmp_path)


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sparsity_report(tmp_path / "nowhere")
