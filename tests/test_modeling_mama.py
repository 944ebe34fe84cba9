"""`MamaConfig` and its models: saved and loaded, with and without the package, trained, adapted and compiled."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mix6
import pytest
import torch
from datasets import Dataset
from families import DECODERS, masked, random_ids
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from mama_hf import MamaConfig, MamaForCausalLM, MamaPruningCallback, MamaPruningConfig, shrink, sparsity_report
from mama_hf.modeling_mama import FORMAT_VERSION, MamaForSequenceClassification, MamaModel


LAYERS = {
    "0": {"intermediate_size": 11, "num_attention_heads": 6, "num_key_value_heads": 3},
    "1": {"intermediate_size": 22, "num_attention_heads": 4, "num_key_value_heads": 2},
}
CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def fields(**changes: Any) -> dict[str, Any]:
    return {
        **{"base_model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "per_layer_config": LAYERS},
        **changes,
    }


@pytest.fixture
def small() -> PreTrainedModel:
    """A Llama with biases, 11 and 22 neurons, 3 and 2 key-value heads."""
    return shrink(masked("llama"))


@pytest.fixture
def folder(small: PreTrainedModel, tmp_path: Path) -> Path:
    small.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_ids()).logits


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# The config.


def test_config_is_the_base_config_with_layers(tmp_path: Path) -> None:
    config = MamaConfig(**fields(mama={"sparsity": 0.5}))
    assert isinstance(config, LlamaConfig)
    assert config.head_dim == 4
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["per_layer_config"] == LAYERS
    assert (values["model_type"], values["base_model_type"], values["format_version"]) == ("mama", "llama", 1)
    assert loaded.to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}
    assert loaded.mama == {"sparsity": 0.5}
    assert copy.deepcopy(loaded).layer_sizes == loaded.layer_sizes == list(LAYERS.values())


def test_layers_are_seen_as_transformers_sees_them() -> None:
    """Static caches and prefix tuning ask there for the heads of a layer; the rest is the model's, live."""
    config = MamaConfig(**fields())
    layers = config.per_layer_config
    assert [layer.num_key_value_heads for layer in layers] == [3, 2]
    assert [layer.head_dim for layer in layers[-1:]] == [4]
    assert len(layers) == 2
    config.attention_dropout = 0.25
    assert layers[0].attention_dropout == copy.deepcopy(layers[1]).attention_dropout == 0.25
    assert layers["full_attention"] is config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, r"format_version=2 .*only 1\. Load it with"),
        ({"base_model_type": "mamba"}, r"base_model_type='mamba'.*Known are llama, mistral"),
        ({"base_model_type": None}, r"base_model_type=None"),
        ({"per_layer_config": {"0": LAYERS["0"]}}, r"per_layer_config has no entry for layer 1"),
        ({"per_layer_config": {}}, r"per_layer_config has no entry for layer 0, 1"),
        ({"per_layer_config": {**LAYERS, "2": LAYERS["0"]}}, r"entry for layer 2, but num_hidden_layers is 2"),
        (
            {"per_layer_config": {**LAYERS, "1": {**LAYERS["1"], "intermediate_size": 0}}},
            r'per_layer_config\["1"\]\["intermediate_size"\] is 0',
        ),
        ({"per_layer_config": {**LAYERS, "1": 3}}, r'per_layer_config\["1"\] is 3\. It must hold intermediate_size'),
        (
            {"per_layer_config": {**LAYERS, "1": {"intermediate_size": 3}}},
            r'per_layer_config\["1"\]\["num_attention_heads"\] is None',
        ),
        (
            {"per_layer_config": {**LAYERS, "1": {**LAYERS["1"], "num_attention_heads": 3}}},
            r'per_layer_config\["1"\]: num_attention_heads=3 must be num_key_value_heads=2 times 2',
        ),
    ],
)
def test_fields_that_cannot_be_read(changes: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        MamaConfig(**fields(**changes))
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_config_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="per_layer_config has no entry for layer 0, 1"):
        MamaConfig(base_model_type="llama", num_hidden_layers=2)


def test_wrong_shapes_are_named(folder: Path) -> None:
    edit(folder, per_layer_config={**LAYERS, "1": {**LAYERS["1"], "intermediate_size": 21}})
    wrong = (
        r"per_layer_config does not describe the weights: model\.layers\.1\.mlp\.down_proj\.weight is \(32, 22\) and "
    )
    with pytest.raises(ValueError, match=wrong + r"should be \(32, 21\).*up_proj"):
        AutoModelForCausalLM.from_pretrained(folder)
    loaded, info = MamaForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert loaded.model.layers[1].mlp.down_proj.in_features == 21
    assert len(info["mismatched_keys"]) == 5


def test_a_class_that_the_architecture_has_not() -> None:
    with pytest.raises(ValueError, match="MamaForCausalLM can't be made from a MamaConfig of ModernBertConfig"):
        MamaForCausalLM(
            MamaConfig(
                **fields(
                    base_model_type="modernbert",
                    num_key_value_heads=8,
                    per_layer_config={
                        key: {**sizes, "num_key_value_heads": sizes["num_attention_heads"]}
                        for key, sizes in LAYERS.items()
                    },
                )
            )
        )
    with pytest.raises(ValueError, match="MamaForCausalLM can't be made from a LlamaConfig"):
        MamaForCausalLM(LlamaConfig())


# The models.


@pytest.mark.parametrize("make", [MamaForCausalLM, AutoModelForCausalLM.from_config, MamaForCausalLM._from_config])
def test_from_a_config(make: Callable[..., PreTrainedModel]) -> None:
    """New weights are drawn as in the base model."""
    torch.manual_seed(0)
    model = make(MamaConfig(**fields(initializer_range=0.5)))
    assert isinstance(model, MamaForCausalLM)
    assert not isinstance(model, MamaModel)
    assert model.model.layers[1].mlp.down_proj.weight.shape == (32, 22)
    assert model.model.layers[1].mlp.down_proj.weight.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"device_map": {"": "cpu"}}, {"dtype": "auto"}])
def test_loading(options: dict[str, Any], folder: Path, small: PreTrainedModel) -> None:
    for auto_class in (AutoModelForCausalLM, MamaForCausalLM):
        loaded = auto_class.from_pretrained(folder, **options)
        assert type(loaded) is type(small)
        assert loaded.dtype == (options["dtype"] if options.get("dtype") is torch.bfloat16 else torch.float32)
        tolerance = 0.5 if loaded.dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(logits(loaded).float(), logits(small), rtol=0, atol=tolerance)
    base = AutoModel.from_pretrained(folder)
    assert isinstance(base, MamaModel)
    assert torch.equal(base.layers[0].mlp.up_proj.weight, small.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_shards_and_tied_weights(name: str, tmp_path: Path) -> None:
    model = shrink(masked(name))
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_report_of_a_folder(folder: Path, small: PreTrainedModel) -> None:
    assert sparsity_report(folder)["total"] == sparsity_report(small)["total"]
    assert sparsity_report(folder)["layers"]["model.layers.1.mlp.up_proj.weight"]["shape"] == [22, 32]


def test_classification(small: PreTrainedModel, folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    assert isinstance(model, MamaForSequenceClassification)
    assert model.score.out_features == 3
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, small.model.layers[1].mlp.up_proj.weight)
    assert isinstance(shrink(masked_copy(model)), MamaForSequenceClassification)


def masked_copy(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model)
    for linear in (other.model.layers[0].mlp.gate_proj, other.model.layers[0].mlp.up_proj):
        linear.weight.data[:4], linear.bias.data[:4] = 0.0, 0.0
    return other


_SCRIPT = """
import json, sys
if sys.argv[2] != "package":
    sys.modules["mama_hf"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
if sys.argv[2] == "package":
    import mama_hf
options = {}
if sys.argv[2] == "remote":
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
    except ValueError as error:
        print(json.dumps(str(error)))
    options["trust_remote_code"] = True
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
ids = torch.tensor(json.loads(sys.argv[3]))
tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False).tolist()
model.save_pretrained(sys.argv[1] + "-again")
print(json.dumps([type(model).__module__, model(input_ids=ids).logits.tolist(), tokens]))
"""


@pytest.mark.parametrize("way", ["package", "remote"])
def test_in_a_fresh_process(way: str, folder: Path, small: PreTrainedModel, tmp_path: Path) -> None:
    """With the package imported; and without it, where a load fails loudly unless the file beside the weights is
    trusted."""
    assert (folder / "modeling_mama.py").is_file()
    ids = random_ids()
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _SCRIPT, str(folder), way, json.dumps(ids.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    module, values, tokens = json.loads(lines[-1])
    if way == "remote":
        assert "trust_remote_code=True" in json.loads(lines[0])
        assert module.startswith("transformers_modules.")
    else:
        assert module == "mama_hf.modeling_mama"
    torch.testing.assert_close(torch.tensor(values), logits(small), rtol=0, atol=1e-6)
    for file in ("modeling_mama.py", "config.json"):
        assert (folder.with_name("small-again") / file).read_text() == (folder / file).read_text()
    assert tokens == small.generate(input_ids=ids, max_new_tokens=6, do_sample=False).tolist()


# Training.


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_gradients_are_those_of_the_masked_model(name: str, checkpointing: bool) -> None:
    model = masked(name)
    small = shrink(model)
    for part in (model, small):
        part.train()
        if checkpointing:
            part.activation_checkpointing_enable()
        part(input_ids=random_ids(), labels=random_ids()).loss.backward()
    for part_name in ("get_input_embeddings", "get_output_embeddings"):
        expected, given = (getattr(part, part_name)().weight.grad for part in (model, small))
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_compiled(small: PreTrainedModel) -> None:
    expected = logits(small)
    compiled: Any = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected)


def test_compiled_with_its_own_config(small: PreTrainedModel) -> None:
    phi = shrink(masked("phi3"))
    expected = logits(phi)
    compiled: Any = torch.compile(phi, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected)
    phi.set_attn_implementation("eager")
    torch.testing.assert_close(logits(phi), expected)
    assert phi.model.layers[0].self_attn.config._attn_implementation == "eager"


def test_lora(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A shrunk model of the demo's architecture, with its tokenizer."""
    tokenizer = mix6.build_tokenizer()
    model = mix6.build_model(tokenizer, seed=0)
    layer = model.model.layers[0]
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
        linear.weight.data[:8] = 0.0
    shrink(model).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_sft_step(chat: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["a482913=123489"] * 8})
    arguments = SFTConfig(str(tmp_path / "run"), max_steps=1, activation_checkpointing=False, **CPU)
    trainer = SFTTrainer(model=str(chat), args=arguments, train_dataset=rows)
    assert isinstance(trainer.model, MamaForCausalLM)
    before = trainer.model.model.layers[0].mlp.up_proj.weight.clone()
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert isinstance(loaded, MamaForCausalLM)
    assert not torch.equal(loaded.model.layers[0].mlp.up_proj.weight, before)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").vocab_size == AutoTokenizer.from_pretrained(chat).vocab_size


def test_grpo_step(chat: Path, tmp_path: Path) -> None:
    """With a reference model, which TRL loads from the folder by itself."""

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(index) for index, _ in enumerate(completions)]

    arguments = GRPOConfig(
        str(tmp_path / "run"),
        **{"max_steps": 1, "beta": 0.1, "num_generations": 2, "per_device_train_batch_size": 2},
        **{"max_completion_length": 4, "activation_checkpointing": False, "learning_rate": 1e-3},
        **CPU,
    )
    trainer = GRPOTrainer(
        model=str(chat),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["?482913="] * 4}),
    )
    assert isinstance(trainer.ref_model, MamaForCausalLM)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert any(not torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


def test_pruning_goes_on(
    small: PreTrainedModel, make_dataset: Callable[..., Dataset], training_arguments: Callable[..., TrainingArguments]
) -> None:
    callback = MamaPruningCallback(MamaPruningConfig(final_sparsity=0.5))
    Trainer(small, training_arguments(), train_dataset=make_dataset(), callbacks=[callback]).train()
    targets = sparsity_report(small)["targets"]
    assert targets["zeros"] == round(0.5 * targets["parameters"])


# Quantized by the usual loader.


def test_loads_quantized_to_int8(small: PreTrainedModel, tmp_path: Path) -> None:
    """`TorchAoConfig` in `from_pretrained`: the Linears of every width become int8, and the logits stay close."""
    quantization = pytest.importorskip("torchao.quantization", reason="of the extra `test`")
    from transformers import TorchAoConfig

    small.eval().save_pretrained(tmp_path / "small")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", quantization_config=config, dtype=torch.float32)
    assert isinstance(model, MamaForCausalLM)
    weights = [layer.mlp.down_proj.weight for layer in model.model.layers]
    assert [weight.shape[1] for weight in weights] == [11, 22]
    assert all(type(weight) is not torch.nn.Parameter for weight in weights)
    expected, given = logits(small), logits(model)
    assert 0 < (given - expected).abs().max() < 0.05 * expected.abs().max()
    assert model.generate(random_ids(), max_new_tokens=4, do_sample=False).shape == (2, 16)
    model.save_pretrained(tmp_path / "int8")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "int8")), given)
