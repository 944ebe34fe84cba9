"""Tests of `mama_hf.packed`."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import masked
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

from mama_hf import MamaForCausalLM, MamaPruningConfig, save_packed, shrink, sparsity_report
from mama_hf.checkpoint import describe
from mama_hf.packed import MamaPackedConfig


MakeModel = Callable[..., PreTrainedModel]
NAMES = ["llama", "tied-llama", "qwen2", "gpt2", "bert", "mixtral"]


def prune(model: PreTrainedModel, sparsity: float = 0.8) -> PreTrainedModel:
    """Random zeros, everywhere but in embeddings and vectors."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
            parameter.data *= torch.rand(parameter.shape, generator=generator) >= sparsity
    return model.eval()


@pytest.fixture
def packed(tmp_path: Path, tiny_llama: PreTrainedModel) -> Path:
    """The folder of a pruned tiny llama."""
    save_packed(prune(tiny_llama), tmp_path / "packed")
    return tmp_path / "packed"


def assert_equal(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    state, other = first.state_dict(), second.state_dict()
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []
    ids = torch.arange(3, 11).view(2, 4)
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str, max_shard_size: str, make_model: MakeModel, tmp_path: Path) -> None:
    model = prune(make_model(name)).to(torch.bfloat16)
    files = save_packed(model, tmp_path, max_shard_size=max_shard_size)
    assert set(files) == {path.name for path in tmp_path.iterdir()}
    assert sum(file.endswith(".safetensors") for file in files) > (max_shard_size == "20KB")
    loaded = (AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM).from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.name_or_path == loaded.name_or_path == str(tmp_path)
    assert_equal(loaded, model)
    if name == "tied-llama":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_round_trip_of_a_model_with_uneven_layers(name: str, tmp_path: Path) -> None:
    model = prune(shrink(masked(name))).to(torch.bfloat16)
    assert isinstance(model, MamaForCausalLM)
    save_packed(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.layer_sizes == model.config.layer_sizes
    assert_equal(loaded, model)
    assert sparsity_report(tmp_path)["total"] == sparsity_report(model)["total"]


@pytest.mark.parametrize(("sparsity", "limit"), [(0.5, 0.57), (0.8, 0.27)])
def test_size_on_disk(sparsity: float, limit: float, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", hidden_size=512, intermediate_size=1024, vocab_size=8).to(torch.bfloat16)
    prune(model, sparsity).save_pretrained(tmp_path / "dense")
    save_packed(model, tmp_path / "packed")
    packed = (tmp_path / "packed/packed_model.safetensors").stat().st_size
    assert packed <= limit * (tmp_path / "dense/model.safetensors").stat().st_size


def test_options_of_from_pretrained(packed: Path, tiny_llama: PreTrainedModel) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        packed,
        dtype=torch.float16,
        attn_implementation="eager",
        device_map="cpu",
        output_loading_info=True,
        use_cache=False,
    )
    assert not any(info.values())
    assert (model.dtype, model.config._attn_implementation, model.config.use_cache) == (torch.float16, "eager", False)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in tiny_llama.half().state_dict().items())


def test_other_auto_classes(packed: Path, tiny_llama: PreTrainedModel) -> None:
    base = AutoModel.from_pretrained(packed)
    assert type(base) is LlamaModel
    assert torch.equal(base.layers[1].mlp.up_proj.weight, tiny_llama.model.layers[1].mlp.up_proj.weight)
    config = AutoConfig.from_pretrained(packed)
    assert type(config) is MamaPackedConfig
    assert type(AutoModelForCausalLM.from_config(config)) is LlamaForCausalLM
    with pytest.raises(ValueError, match="LlamaConfig"):
        AutoModelForMaskedLM.from_pretrained(packed)


@pytest.mark.parametrize("name", NAMES)
def test_report_of_a_packed_folder(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    model = prune(make_model(name))
    save_packed(model, tmp_path, max_shard_size="20KB")
    assert sparsity_report(tmp_path)["total"] == sparsity_report(model)["total"]
    assert sparsity_report(tmp_path)["targets"] == sparsity_report(model)["targets"]


def test_generation_config_and_recipe(make_model: MakeModel, tmp_path: Path) -> None:
    model = prune(make_model("llama"))
    model.generation_config.max_new_tokens = 5
    describe(model, MamaPruningConfig(final_sparsity=0.8), 0.8)
    save_packed(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 5
    assert loaded.config.mama == model.config.mama
    assert MamaPruningConfig.from_pretrained(tmp_path) == MamaPruningConfig(final_sparsity=0.8)
    ids = torch.arange(3, 7).unsqueeze(0)
    assert torch.equal(loaded.generate(ids, do_sample=False), model.generate(ids, do_sample=False))
    assert loaded.generate(ids).shape[1] <= 9


def test_saving_changes_nothing(make_model: MakeModel, tmp_path: Path) -> None:
    model, untouched = prune(make_model("llama")), prune(make_model("llama"))
    model.config.name_or_path = "/some/where"
    save_packed(model, tmp_path)
    assert_equal(model, untouched)
    assert model.config.name_or_path == "/some/where"
    assert "/some/where" not in (tmp_path / "config.json").read_text()


def test_a_loaded_model_saves_unpacked_and_packed(packed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path / "dense")
    assert type(AutoConfig.from_pretrained(tmp_path / "dense")) is type(model.config)
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), model)
    save_packed(model, tmp_path / "again")
    name = "packed_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (packed / name).read_bytes()


def test_saving_again_leaves_no_shards(packed: Path, tiny_llama: PreTrainedModel) -> None:
    save_packed(tiny_llama, packed, max_shard_size="20KB")
    assert not (packed / "packed_model.safetensors").exists()
    files = save_packed(tiny_llama, packed)
    assert {path.name for path in packed.iterdir()} == set(files)


def test_a_stopped_save_leaves_no_loadable_folder(
    packed: Path, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mama_hf.packed._write_configs", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_packed(tiny_llama, packed)
    with pytest.raises((ValueError, OSError), match="config"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_each_tensor_is_unpacked_once_and_handed_over(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was unpacked is what the model holds: there is no second copy of a weight."""
    from mama_hf import packing

    pointers: list[int] = []
    original = packing.StoredTensor.__getitem__

    def spy(self: packing.StoredTensor, index: Any) -> torch.Tensor:
        tensor = original(self, index)
        pointers.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(packing.StoredTensor, "__getitem__", spy)
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert sorted(pointers) == sorted(parameter.data_ptr() for parameter in model.parameters())


WITHOUT = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

for loader in (AutoConfig, AutoModelForCausalLM, LlamaForCausalLM):
    try:
        loader.from_pretrained(sys.argv[1])
    except (ValueError, OSError, KeyError) as error:
        print(loader.__name__, str(error).replace("\\n", " "))
assert "mama_hf" not in sys.modules
"""


def test_without_the_package_loading_fails(packed: Path) -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT, str(packed)], capture_output=True, text=True, check=True)
    messages = run.stdout.splitlines()
    assert [line.split()[0] for line in messages] == ["AutoConfig", "AutoModelForCausalLM", "LlamaForCausalLM"]
    assert all("mama_packed" in line for line in messages[:2])
    assert "model.safetensors" in messages[2]


@pytest.mark.parametrize("option", ["variant", "quantization_config", "offload_folder"])
def test_options_that_are_refused(option: str, packed: Path) -> None:
    with pytest.raises(ValueError, match=f"can't be loaded with {option}"):
        AutoModelForCausalLM.from_pretrained(packed, **{option: {"load_in_8bit": True}})


def test_offloading_to_disk_is_refused(packed: Path) -> None:
    with pytest.raises(ValueError, match="device_map with 'disk'"):
        AutoModelForCausalLM.from_pretrained(packed, device_map={"model": "disk", "lm_head": "cpu"})


def test_damage_is_refused(packed: Path) -> None:
    path = packed / "packed_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not what was saved: its SHA-256 differs"):
        AutoModelForCausalLM.from_pretrained(packed)
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="damaged or truncated"):
        AutoModelForCausalLM.from_pretrained(packed)
    path.unlink()
    with pytest.raises(OSError, match=r"packed_model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 2, "format_version=2; mama-hf .* reads 1"),
        ("format_version", None, "format_version=None"),
        ("base_config", None, "base_config=None"),
        ("base_config", {"model_type": "lama"}, "base_config={'model_type': 'lama'}"),
    ],
)
def test_damaged_config_is_refused(key: str, value: Any, message: str, packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(packed)


def test_what_cannot_be_packed(tiny_llama: PreTrainedModel, make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear, which is not a transformers model"):
        save_packed(torch.nn.Linear(2, 2), tmp_path)
    tiny_llama.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="holds an unpacked model"):
        save_packed(tiny_llama, tmp_path / "dense")
    with torch.device("meta"):
        skeleton = make_model("llama")
    with pytest.raises(ValueError, match="not in memory"):
        save_packed(skeleton, tmp_path / "meta")
    lora = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Merge a PEFT adapter first"):
        save_packed(lora, tmp_path / "lora")
    tiny_llama._hf_peft_config_loaded = True  # as `add_adapter` does, with a newer PEFT
    with pytest.raises(ValueError, match="it has an adapter"):
        save_packed(tiny_llama, tmp_path / "adapter")
    assert not (tmp_path / "lora").exists()
