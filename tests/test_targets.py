"""Tests of `mama_hf.targets`."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextExperts
from transformers.pytorch_utils import Conv1D

from mama_hf import MamaPruningConfig
from mama_hf.targets import LoraTarget, Target, find_targets


ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
FFN = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
BERT = [
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
]

Lora = Callable[..., PeftModel]


def names(model: nn.Module, **recipe: Any) -> list[str]:
    return [target.name for target in find_targets(model, MamaPruningConfig(**recipe))]


def per_layer(prefix: str, modules: list[str], layers: tuple[int, ...] = (0, 1), suffix: str = ".weight") -> list[str]:
    return [f"{prefix}.{layer}.{module}{suffix}" for layer in layers for module in modules]


LLAMA = per_layer("model.layers", ATTENTION + FFN)

ALL_LINEAR = {
    "llama": LLAMA,
    "tied-llama": LLAMA,
    "qwen2": LLAMA,
    "gpt2": per_layer("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "bert": [*per_layer("bert.encoder.layer", BERT), "cls.predictions.transform.dense.weight"],
    "mixtral": [
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in [*(f"{module}.weight" for module in ATTENTION), *EXPERTS]
    ],
}


@pytest.mark.parametrize("name", ALL_LINEAR)
def test_all_linear(name: str, make_model: Callable[..., PreTrainedModel]) -> None:
    """Neither embeddings, nor the output layer, nor norms, nor biases, nor a router."""
    model = make_model(name)
    assert names(model) == ALL_LINEAR[name]
    parameters = dict(model.named_parameters())
    for target in find_targets(model, MamaPruningConfig()):
        assert target.parameter is parameters[target.name]
        assert target.module is model.get_submodule(target.name.rpartition(".")[0])


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, per_layer("model.layers", [ATTENTION[0], ATTENTION[2]])),
        ({"target_modules": ["1.mlp.up_proj"]}, ["model.layers.1.mlp.up_proj.weight"]),
        ({"target_modules": ["model.layers.0.mlp.up_proj"]}, ["model.layers.0.mlp.up_proj.weight"]),
        ({"target_modules": ["proj", "q_proj"]}, per_layer("model.layers", ATTENTION[:1])),  # suffixes of whole parts
        ({"target_modules": r".*\.0\..*_proj"}, per_layer("model.layers", ATTENTION + FFN, (0,))),
        ({"target_modules": r".*(up|down)_proj"}, per_layer("model.layers", FFN[1:])),
        ({"exclude_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, per_layer("model.layers", FFN)),
        ({"exclude_modules": r".*\.layers\.0\..*"}, per_layer("model.layers", ATTENTION + FFN, (1,))),
        (
            {"target_modules": ["up_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]},
            ["model.layers.0.mlp.up_proj.weight"],
        ),
        ({"target_modules": ["up_proj", "lm_head", "embed_tokens"]}, per_layer("model.layers", FFN[1:2])),
    ],
)
def test_patterns(recipe: dict[str, Any], expected: list[str], tiny_llama: PreTrainedModel) -> None:
    assert names(tiny_llama, **recipe) == expected


@pytest.mark.parametrize(
    "recipe",
    [
        {"target_modules": ["qproj"]},
        {"target_modules": "q_proj"},  # a regular expression for the whole name
        {"target_modules": r"model\.layers\.0"},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"exclude_modules": ".*"},
    ],
)
def test_no_match_lists_the_names(recipe: dict[str, Any], tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="No weight can be pruned") as raised:
        names(tiny_llama, **recipe)
    message = str(raised.value)
    assert repr(next(iter(recipe.values()))) in message
    assert all(name.removesuffix(".weight") in message for name in [*LLAMA, "lm_head"])


def test_model_without_a_matrix() -> None:
    with pytest.raises(ValueError, match="Modules with a weight: none"):
        names(nn.Sequential(nn.LayerNorm(4)))


# What is left out, with a logged reason.


def reasons(model: nn.Module, caplog: pytest.LogCaptureFixture, **recipe: Any) -> dict[str, str]:
    with caplog.at_level(logging.INFO, logger="mama_hf.targets"):
        names(model, **recipe)
    return dict(record.getMessage().split(" is not pruned: ") for record in caplog.records)


@pytest.mark.parametrize(
    ("name", "output", "reason"),
    [
        ("llama", "lm_head.weight", "it is the output layer."),
        ("tied-llama", "lm_head.weight", "it is an embedding."),
        ("gpt2", "lm_head.weight", "it is an embedding."),
        ("bert", "cls.predictions.decoder.weight", "it is an embedding."),
    ],
)
def test_output_layer(
    name: str,
    output: str,
    reason: str,
    make_model: Callable[..., PreTrainedModel],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model(name)
    assert model.get_output_embeddings() is not None
    assert reasons(model, caplog) == {output: reason}


def test_frozen(tiny_llama: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    tiny_llama.model.layers[0].requires_grad_(False)
    frozen = per_layer("model.layers", ATTENTION + FFN, (0,))
    given = reasons(tiny_llama, caplog)
    assert {name: given[name] for name in frozen} == dict.fromkeys(frozen, "it has no gradient (requires_grad=False).")
    assert names(tiny_llama) == per_layer("model.layers", ATTENTION + FFN, (1,))


def test_tied_linears(caplog: pytest.LogCaptureFixture) -> None:
    """Two modules that share a parameter, and one module in two places."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcd"})
    model["b"].weight = model["a"].weight
    model["e"] = model["d"]
    assert reasons(model, caplog) == {
        "a.weight": "it is tied to a.weight.",
        "b.weight": "it is tied to a.weight.",
        "d.weight": "it is tied to d.weight.",
    }
    assert names(model) == ["c.weight"]


class Vision(nn.Module):
    """What vision and audio models have beside their Linear: 3-D parameters that are no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(4, 8, 3)
        self.patches = nn.Conv2d(3, 4, 2)
        self.position_embeddings = nn.Parameter(torch.randn(1, 5, 8))
        self.projection = nn.Linear(8, 8)


def test_other_parameters_are_no_targets() -> None:
    assert names(nn.ModuleDict({"vision": Vision()})) == ["vision.projection.weight"]


# Layouts.


def layout(kind: str) -> tuple[Target, int, int]:
    """(a target, O in all, I)."""
    if kind == "experts [E, I, O]":
        config = GptOssConfig(hidden_size=6, intermediate_size=5, num_local_experts=3)
        return find_targets(nn.ModuleDict({"experts": GptOssExperts(config)}), MamaPruningConfig())[0], 3 * 10, 6
    module = nn.Linear(6, 4) if kind == "Linear" else Conv1D(4, 6)
    return find_targets(nn.ModuleDict({"layer": module}), MamaPruningConfig())[0], 4, 6


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "experts [E, I, O]"])
def test_rows_round_trip(kind: str) -> None:
    target, outputs, inputs = layout(kind)
    values = torch.arange(target.parameter.numel()).reshape(target.parameter.shape)
    rows = target.to_rows(values)
    assert rows.shape == (outputs, inputs)
    assert target.num_inputs == inputs
    again = target.from_rows(rows)
    assert torch.equal(again, values)
    assert again.is_contiguous()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_rows_are_outputs(name: str, make_model: Callable[..., PreTrainedModel]) -> None:
    """Row o gives output o: zeroing it zeroes that output for each input, and no other."""
    for target in find_targets(make_model(name), MamaPruningConfig()):
        mask = torch.ones_like(target.to_rows(target.weight), dtype=torch.bool)
        mask[1] = False
        target.parameter.data *= target.from_rows(mask)
        module = target.module
        if getattr(module, "bias", None) is not None:
            module.bias.data.zero_()
        output = module(torch.randn(5, target.num_inputs))
        assert not bool(output[:, 1].any())
        assert bool(output[:, 0].all())
        assert bool(output[:, 2:].all())


@pytest.mark.parametrize("transposed", [False, True])
def test_expert_rows_are_outputs(transposed: bool, make_model: Callable[..., PreTrainedModel]) -> None:
    """Zeroing the rows of `down_proj` that give hidden feature 1, in each expert, zeroes that feature."""
    if transposed:
        experts: nn.Module = GptOssExperts(GptOssConfig(hidden_size=6, intermediate_size=5, num_local_experts=3))
        for parameter in experts.parameters():
            nn.init.normal_(parameter)
        nn.init.zeros_(experts.down_proj_bias)
    else:
        experts = make_model("mixtral").model.layers[0].mlp.experts
    target = find_targets(nn.ModuleDict({"experts": experts}), MamaPruningConfig())[-1]
    hidden = target.parameter.shape[2 if transposed else 1]
    mask = torch.ones(len(target.parameter), hidden, target.num_inputs, dtype=torch.bool)
    mask[:, 1] = False
    target.parameter.data *= target.from_rows(mask.flatten(0, 1))
    indices = torch.tensor([[0, 1], [1, 2], [2, 0]])
    output = experts(torch.randn(3, hidden), indices, torch.full((3, 2), 0.5))
    assert not bool(output[:, 1].any())
    assert bool(output[:, 2:].all())
    assert bool(output[:, 0].all())


def test_experts_of_another_layout_are_refused() -> None:
    """Llama 4 holds [E, I, O] without saying so: better no pruning than pruning across the wrong dimension."""
    config = Llama4TextConfig(hidden_size=8, intermediate_size=4, num_local_experts=2)
    model = nn.ModuleDict({"experts": Llama4TextExperts(config), "linear": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"experts.*Llama4TextExperts"):
        names(model)
    assert names(model, exclude_modules=["experts"]) == ["linear.weight"]


# What can't be pruned.


@pytest.mark.parametrize(
    ("granularity", "final", "name"),
    [("3:5", 0.4, "model.layers.0.self_attn.q_proj.weight has 32"), ("1:64", 1 - 1 / 64, "q_proj.weight has 32")],
)
def test_n_of_m_names_the_layer(granularity: str, final: float, name: str, tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=rf"granularity='{granularity}'.*{name}"):
        names(tiny_llama, granularity=granularity, final_sparsity=final)


def test_n_of_m_counts_inputs(make_model: Callable[..., PreTrainedModel]) -> None:
    """GPT-2 with an FFN of 60: c_fc has 32 inputs, c_proj 60, whatever their layout."""
    model = make_model("gpt2", n_inner=60)
    with pytest.raises(ValueError, match=r"divisible by 8, but transformer\.h\.0\.mlp\.c_proj\.weight has 60"):
        names(model, granularity="4:8")
    assert len(names(model, granularity="4:8", exclude_modules=["mlp.c_proj"])) == 6
    assert len(names(model, granularity="2:4")) == 8


def test_wanda_needs_visible_inputs(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("mixtral")
    with pytest.raises(ValueError, match=r"wanda.*model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        names(model, criterion="wanda")
    assert names(model, criterion="wanda", exclude_modules=["experts"]) == per_layer("model.layers", ATTENTION)


class Linear4bit(nn.Linear):
    """As bitsandbytes names it; that library needs no GPU to be recognised."""


@pytest.mark.parametrize("make", [Linear4bit, lambda *shape: nn.Linear(*shape, device="meta")])
def test_quantized_is_refused(make: Callable[..., nn.Module]) -> None:
    model = nn.ModuleDict({"fine": nn.Linear(4, 4), "bad": make(4, 4)})
    with pytest.raises(ValueError, match=r"bad\.weight is torch\..*quantized or not materialized.*Load the model in"):
        names(model)
    assert names(model, exclude_modules=["bad"]) == ["fine.weight"]


# LoRA.


@pytest.fixture
def lora(make_model: Callable[..., PreTrainedModel]) -> Lora:
    """A model under LoRA, its B factors drawn at random so that the adapter does something."""

    def make(name: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
        values = {"r": 3, "target_modules": "all-linear", "lora_dropout": 0.0, "fan_in_fan_out": name == "gpt2"}
        model = get_peft_model(make_model(name).to(dtype), LoraConfig(**{**values, **config}))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.05)
        return model

    return make


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_lora_targets(name: str, lora: Lora) -> None:
    targets = find_targets(lora(name), MamaPruningConfig())
    assert [target.name for target in targets] == ALL_LINEAR[name]
    assert all(isinstance(target, LoraTarget) for target in targets)


def test_lora_on_some_modules(lora: Lora) -> None:
    """The rest of the model is frozen, so that it has no gradient to prune by."""
    assert names(lora(target_modules=["q_proj"])) == per_layer("model.layers", ATTENTION[:1])
    trained = lora(target_modules=["q_proj"], modules_to_save=["up_proj"])
    assert sorted(names(trained)) == sorted(per_layer("model.layers", [ATTENTION[0], FFN[1]]))


@pytest.mark.parametrize("wrapped", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"]])
def test_lora_on_the_output_layer(wrapped: list[str], lora: Lora) -> None:
    assert names(lora(target_modules=wrapped)) == per_layer("model.layers", ATTENTION[:1])


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_alpha": 7}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_weight_and_gradient(name: str, config: dict[str, Any], lora: Lora) -> None:
    """The weight is the merged one; the gradient is the first-order move of it under a descent step on the factors."""
    model = lora(name, **config)
    targets = find_targets(model, MamaPruningConfig())
    assert all(target.gradient is None for target in targets)
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    before = [target.weight for target in targets]
    gradients = [target.gradient for target in targets]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    for target, weight, gradient in zip(targets, before, gradients):
        assert gradient is not None
        torch.testing.assert_close((weight - target.weight) / 1e-3, gradient, rtol=0.02, atol=2e-4)
    weights = [target.weight for target in targets]
    merged = dict(model.merge_and_unload().named_parameters())
    for target, weight in zip(targets, weights):
        torch.testing.assert_close(merged[target.name].detach(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_mask_holds_after_the_merge(name: str, dtype: torch.dtype, lora: Lora) -> None:
    model = lora(name, dtype).to(dtype)
    targets = find_targets(model, MamaPruningConfig())
    masks = [torch.rand(target.parameter.shape) < 0.5 for target in targets]
    before = [target.weight for target in targets]
    for target, mask in zip(targets, masks):
        target.apply_mask_(mask)
    merged = dict(model.merge_and_unload().named_parameters())
    for target, mask, weight in zip(targets, masks, before):
        assert not bool(merged[target.name][~mask].any())
        assert torch.equal(merged[target.name][mask], weight[mask])


def second_adapter(model: PeftModel) -> PeftModel:
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def merged(model: PeftModel) -> PeftModel:
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("config", "change", "problem"),
    [
        ({"lora_dropout": 0.1}, None, "lora_dropout > 0.*set lora_dropout=0"),
        ({"use_dora": True}, None, "DoRA.*use plain LoRA"),
        ({}, second_adapter, "2 active adapters"),
        ({}, merged, "merged already"),
        ({"dtype": torch.bfloat16}, None, "base weight in torch.bfloat16 and an adapter in torch.float32"),
    ],
)
def test_lora_variants_are_refused(config: dict[str, Any], change: Any, problem: str, lora: Lora) -> None:
    model = lora(**config)
    model = model if change is None else change(model)
    with pytest.raises(ValueError, match=rf"^model\.layers\.0\.self_attn\.q_proj\.weight can't be pruned.*{problem}"):
        names(model, target_modules=["q_proj"])


def test_lora_on_a_quantized_base_is_refused(lora: Lora) -> None:
    model = lora(target_modules=["q_proj"])
    base = model.base_model.model.model.layers[1].self_attn.q_proj.base_layer
    base.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight is torch\.int8.*quantized"):
        names(model)


def test_lora_on_expert_parameters_is_refused(lora: Lora) -> None:
    model = lora("mixtral", target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts"):
        names(model)
    assert names(model, target_modules=["q_proj"]) == per_layer("model.layers", ATTENTION[:1])


def test_other_adapters_leave_nothing(tiny_llama: PreTrainedModel) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(ValueError, match="No weight can be pruned"):
        names(get_peft_model(tiny_llama, config))


def test_conv1d_lora_gradient_has_the_layout_of_the_weight(lora: Lora) -> None:
    model = lora("gpt2", target_modules=["c_fc"])
    ids = torch.randint(3, 64, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    (target, _) = find_targets(model, MamaPruningConfig())
    gradient: Tensor | None = target.gradient
    assert gradient is not None
    assert gradient.shape == target.weight.shape == (32, 64)
    assert target.to_rows(gradient).shape == (64, 32)
