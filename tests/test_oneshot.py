"""`prune_model` on tiny models of several families: counts, saving, errors that change nothing, resuming."""

import json

import pytest
import torch
from conftest import MODELS, VOCABULARY
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import mama_hf.blocks as blocks
import mama_hf.engine as engine
from mama_hf import MamaPruningConfig, prune_model
from mama_hf.pruner import Pruner


_DECODER = MODELS["llama"][2]
FAMILIES = {
    "llama": MODELS["llama"],
    "tied-llama": MODELS["tied-llama"],
    "qwen2": MODELS["qwen2"],
    "gpt2": MODELS["gpt2"],
    "neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
            "pad_token_id": 0,
        },
    ),
    "gemma": (GemmaForCausalLM, GemmaConfig, {**_DECODER, "head_dim": 8}),
    # norms between the projections and the residual stream; every other layer has a sliding window
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**_DECODER, "head_dim": 8, "sliding_window": 8}),
    "mistral": (MistralForCausalLM, MistralConfig, {**_DECODER, "sliding_window": 8}),
    "phi3": (Phi3ForCausalLM, Phi3Config, _DECODER),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**_DECODER, "head_dim": 8}),
}
FLAGSHIP = MamaPruningConfig(criterion="mama", move_values="least_squares")
# (criterion, move_values)
RULES = [
    ("mama", "least_squares"),
    ("mama", "none"),
    ("wanda", "none"),
    ("wanda", "least_squares"),
    ("sparsegpt", "none"),
    ("magnitude", "none"),
    ("magnitude", "mean"),
    ("magnitude", "least_squares"),
    ("random", "none"),
]


def make(name: str, **changes) -> PreTrainedModel:
    model_class, config_class, values = FAMILIES[name]
    torch.manual_seed(0)
    return model_class(config_class(**{**values, **changes})).eval()


def tokens(num: int = 8, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (num, length), generator=torch.Generator().manual_seed(seed))


def batches() -> list:
    padded = {"input_ids": tokens(4, seed=1), "attention_mask": torch.ones(4, 24, dtype=torch.long)}
    padded["attention_mask"][0, :5] = 0
    return [tokens(), padded]


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def logits_error(model: PreTrainedModel, dense: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(tokens()).logits - dense).norm() / dense.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_pruned_saved_and_reloaded(name, tmp_path):
    model = make(name)
    outside = {key: value for key, value in weights(model).items() if "layers." not in key and ".h." not in key}
    report = prune_model(model, FLAGSHIP, batches(), progress=False)
    assert report.sparsity == 0.5
    for key, row in report["layers"].items():
        weight = model.get_parameter(key)
        assert int((weight == 0).sum()) == row["zeros"] == weight.numel() // 2
        assert row["error"] <= row["error_before"] * (1 + 1e-4) + 1e-6
    assert all(torch.equal(model.state_dict()[key], value) for key, value in outside.items())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert MamaPruningConfig.from_pretrained(tmp_path) == FLAGSHIP
    assert loaded.config.mama["sparsity"] == 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_flagship_is_closer_to_the_dense_model_than_its_rivals(name):
    with torch.no_grad():
        dense = make(name)(tokens()).logits
    errors = {}
    for criterion, move in [("mama", "least_squares"), ("sparsegpt", "none"), ("wanda", "none")]:
        model = make(name)
        prune_model(model, MamaPruningConfig(criterion=criterion, move_values=move), batches(), progress=False)
        errors[criterion] = logits_error(model, dense)
    assert errors["mama"] < min(errors["sparsegpt"], errors["wanda"])


@pytest.mark.parametrize("granularity", ["row", "layer", "2:4", "1:4", "4:8"])
@pytest.mark.parametrize(("criterion", "move"), RULES)
def test_every_rule_goes_with_every_granularity(criterion, move, granularity):
    settings = {"scope": granularity, "final_sparsity": 0.6}
    if ":" in granularity:
        kept, group = map(int, granularity.split(":"))
        settings = {"granularity": granularity, "final_sparsity": 1 - kept / group}
    model = make("llama")
    recipe = MamaPruningConfig(criterion=criterion, move_values=move, **settings)
    report = prune_model(model, recipe, batches(), progress=False)
    for key in report["layers"]:
        pruned = model.get_parameter(key) == 0
        if ":" in granularity:
            assert (pruned.reshape(-1, group).sum(dim=1) == group - kept).all()
        elif granularity == "row":
            assert (pruned.sum(dim=1) == round(0.6 * pruned.shape[1])).all()
        else:
            assert int(pruned.sum()) == round(0.6 * pruned.numel())


@pytest.mark.parametrize(
    ("criterion", "move"), [rule for rule in RULES if rule[1] != "none" or rule[0] == "sparsegpt"]
)
def test_values_really_move(criterion, move):
    dense, model = make("llama"), make("llama")
    report = prune_model(model, MamaPruningConfig(criterion=criterion, move_values=move), batches(), progress=False)
    for key in report["layers"]:
        kept = model.get_parameter(key) != 0
        assert not torch.equal(model.get_parameter(key)[kept], dense.get_parameter(key)[kept])


def test_without_moving_kept_values_stay():
    dense, model = make("gpt2"), make("gpt2")
    report = prune_model(model, MamaPruningConfig(criterion="wanda"), batches(), progress=False)
    for key, row in report["layers"].items():
        kept = model.get_parameter(key) != 0
        assert torch.equal(model.get_parameter(key)[kept], dense.get_parameter(key)[kept])
        assert row["error"] == row["error_before"]


def test_wanda_is_wanda():
    """The first layer's mask against the formula, on inputs seen by a hook of the test."""
    seen = []
    dense = make("llama")
    linear = dense.model.layers[0].self_attn.q_proj
    linear.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    ids = tokens()
    with torch.no_grad():
        dense(ids)
    score = linear.weight.detach().abs() * seen[0].reshape(-1, 32).norm(dim=0)
    model = make("llama")
    prune_model(model, MamaPruningConfig(criterion="wanda"), [ids], progress=False)
    for row in range(32):
        assert set(score[row].argsort()[:16].tolist()) == set(
            (model.model.layers[0].self_attn.q_proj.weight[row] == 0).nonzero().flatten().tolist()
        )


def test_padding_does_not_count():
    ids = tokens()
    padded = torch.cat([torch.zeros(8, 6, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    first, second = make("llama"), make("llama")
    recipe = MamaPruningConfig(criterion="wanda")
    prune_model(first, recipe, [ids], progress=False)
    prune_model(
        second, recipe, [{"input_ids": padded, "attention_mask": mask, "position_ids": positions}], progress=False
    )
    for (name, one), two in zip(first.named_parameters(), second.parameters()):
        assert float(((one == 0) != (two == 0)).float().mean()) < 0.01, name  # but for rounding


def test_bf16_is_solved_in_fp32_and_stays_bf16():
    model = make("llama").to(torch.bfloat16)
    report = prune_model(model, FLAGSHIP, batches(), progress=False)
    assert model.dtype == torch.bfloat16
    assert report.sparsity == 0.5
    assert all(row["error"] <= row["error_before"] + 1e-4 for row in report["layers"].values())


def test_owl_shares_the_sparsity_among_blocks():
    model = make("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[0] *= 50
    recipe = MamaPruningConfig(criterion="wanda", allocation="owl", final_sparsity=0.6)
    report = prune_model(model, recipe, batches(), progress=False)
    first, second = (
        {row["sparsity"] for name, row in report["layers"].items() if f"layers.{index}." in name} for index in (0, 1)
    )
    assert max(first) < min(second)
    assert report.sparsity == pytest.approx(0.6, abs=0.01)


def test_bias_is_folded_into_the_biases_there_are():
    model = make("gpt2")
    before = weights(model)
    recipe = MamaPruningConfig(criterion="magnitude", move_values="bias")
    report = prune_model(model, recipe, batches(), progress=False)
    assert not torch.equal(model.transformer.h[0].mlp.c_fc.bias, before["transformer.h.0.mlp.c_fc.bias"])
    assert all(row["error"] < row["error_before"] for row in report["layers"].values())


def test_bias_is_made_where_the_native_class_has_a_place(tmp_path):
    model = make("llama")
    recipe = MamaPruningConfig(criterion="magnitude", move_values="bias")
    prune_model(model, recipe, batches(), progress=False)
    assert model.config.attention_bias
    assert model.config.mlp_bias
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_bias_is_refused_where_there_is_no_place():
    model = make("qwen2")
    before = weights(model)
    with pytest.raises(ValueError, match="o_proj"):
        prune_model(model, MamaPruningConfig(criterion="magnitude", move_values="bias"), batches(), progress=False)
    assert same(before, weights(model))


def test_excluded_modules_stay_dense_and_frozen_ones_are_pruned():
    model = make("llama").requires_grad_(False)
    recipe = MamaPruningConfig(criterion="mama", move_values="least_squares", exclude_modules=["o_proj", "k_proj"])
    report = prune_model(model, recipe, batches(), progress=False)
    assert len(report["layers"]) == 10
    assert int((model.model.layers[0].self_attn.o_proj.weight == 0).sum()) == 0


def test_the_model_is_handed_back_in_its_mode():
    model = make("llama").train()
    model.config.use_cache = True
    prune_model(model, FLAGSHIP, batches(), progress=False)
    assert model.training
    assert model.config.use_cache is True
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_named_device_gives_the_same():
    first, second = make("llama"), make("llama")
    prune_model(first, FLAGSHIP, batches(), progress=False)
    prune_model(second, FLAGSHIP, batches(), device="cpu", progress=False)
    assert same(weights(first), weights(second))


def test_more_iterations_are_closer():
    errors = []
    for iterations in (1, 20):
        report = prune_model(make("llama"), FLAGSHIP, batches(), iterations=iterations, progress=False)
        errors.append(sum(row["error"] for row in report["layers"].values()))
    assert errors[1] < errors[0]


def test_the_report_is_a_table_and_json(tmp_path):
    report = prune_model(make("llama"), FLAGSHIP, batches(), progress=False)
    assert "model.layers.0.self_attn.q_proj.weight" in str(report)
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["sparsity"] == 0.5
    assert saved["layers"] == report.to_dict()["layers"]


def test_too_few_tokens_are_warned_of(caplog):
    prune_model(make("llama"), FLAGSHIP, [tokens(1, 24)], progress=False)
    assert "24 tokens" in caplog.text
    assert "64 inputs" in caplog.text


BAD_CALIBRATION = {
    "empty": ([], "no tokens"),
    "only padding": ([{"input_ids": tokens(), "attention_mask": torch.zeros(8, 24)}], "no tokens"),
    "vocabulary": ([torch.full((2, 8), VOCABULARY)], "vocabulary"),
    "negative": ([torch.full((2, 8), -100)], "vocabulary"),
    "text": (["a text"], "str"),
    "one tensor": (tokens(), "iterable of batches"),
    "floats": ([torch.ones(2, 8)], "ids"),
    "one-dimensional": ([torch.ones(8, dtype=torch.long)], "ids"),
    "mask of another shape": ([{"input_ids": tokens(), "attention_mask": torch.ones(8, 23)}], "attention_mask"),
}


@pytest.mark.parametrize("case", BAD_CALIBRATION)
def test_bad_calibration_is_refused_and_changes_nothing(case):
    calibration, message = BAD_CALIBRATION[case]
    model = make("llama")
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        prune_model(model, FLAGSHIP, calibration, progress=False)
    assert same(before, weights(model))


@pytest.mark.parametrize("recipe", [FLAGSHIP, MamaPruningConfig(criterion="wanda")], ids=["joint", "apart"])
def test_nan_activations_in_the_last_block_change_nothing(recipe):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    before = weights(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1.*NaN"):
        prune_model(model, recipe, batches(), progress=False)
    after = weights(model)
    assert all(torch.equal(value.nan_to_num(), after[name].nan_to_num()) for name, value in before.items())
    assert "mama" not in model.config.to_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"criterion": "taylor"},
        {"criterion": "movement"},
        {"scope": "global"},
        {"regrowth": 0.1},
        {"reward_tolerance": 0.1},
        {"final_sparsity": "auto", "reward_tolerance": 0.1},
    ],
)
def test_recipes_that_need_training_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        prune_model(make("llama"), MamaPruningConfig(**changes), batches(), progress=False)


def test_combinations_that_can_not_work_are_refused_by_name():
    with pytest.raises(ValueError, match="move_values"):
        MamaPruningConfig(criterion="sparsegpt", move_values="mean")
    with pytest.raises(ValueError, match="allocation"):
        MamaPruningConfig(allocation="owl", granularity="2:4")
    with pytest.raises(ValueError, match="iterations"):
        prune_model(make("llama"), FLAGSHIP, batches(), iterations=0)
    with pytest.raises(TypeError, match="recipe"):
        prune_model(make("llama"), {"final_sparsity": 0.5}, batches())  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"criterion": "sparsegpt"}, {"allocation": "owl"}, {"granularity": "layer"}])
def test_the_pruner_refuses_what_only_one_shot_can_do(changes):
    model = make("llama")
    with pytest.raises(NotImplementedError, match=f"{next(iter(changes))}=.*prune_model"):
        Pruner(model, MamaPruningConfig(**changes), torch.optim.SGD(model.parameters()), 10)


@pytest.mark.parametrize("changes", [{"final_sparsity": 0.7}, {"final_sparsity": 0.42}, {"granularity": "2:4"}])
def test_training_holds_the_masks_of_a_pruned_model(changes):
    model = make("llama")
    report = prune_model(model, MamaPruningConfig(move_values="least_squares", **changes), batches(), progress=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = Pruner(model, MamaPruningConfig(**changes), optimizer, 3)  # its scope would round otherwise
    for step in range(3):
        model(tokens(), labels=tokens()).loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.hold()
        optimizer.zero_grad()
        assert not pruner.update(step + 1)
    zeros = {name: int((model.get_parameter(name) == 0).sum()) for name in report["layers"]}
    assert zeros == {name: row["zeros"] for name, row in report["layers"].items()}


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "recipe",
    [
        FLAGSHIP,
        MamaPruningConfig(criterion="sparsegpt"),
        MamaPruningConfig(criterion="wanda", allocation="owl"),
        MamaPruningConfig(criterion="magnitude", move_values="bias"),
    ],
    ids=["mama", "sparsegpt", "owl", "bias"],
)
def test_a_killed_run_resumes_bit_for_bit(recipe, tmp_path, monkeypatch):
    uninterrupted = make("llama", num_hidden_layers=4)
    whole = prune_model(uninterrupted, recipe, batches(), progress=False)
    original, model = engine.Engine._prune_one, make("llama", num_hidden_layers=4)

    def prune_one(self, module, index, *rest):
        if index == 2 and module is self.blocks[2].mlp.up_proj:
            raise Killed
        return original(self, module, index, *rest)

    before = weights(model)
    monkeypatch.setattr(engine.Engine, "_prune_one", prune_one)
    with pytest.raises(Killed):
        prune_model(model, recipe, batches(), resume_dir=tmp_path, progress=False)
    assert same(before, weights(model))
    monkeypatch.undo()
    assert json.loads((tmp_path / "state.json").read_text())["finished"] == 2
    resumed = make("llama", num_hidden_layers=4)
    report = prune_model(resumed, recipe, batches(), resume_dir=tmp_path, progress=False)
    assert same(weights(uninterrupted), weights(resumed))
    assert report["layers"].keys() == whole["layers"].keys()
    again = make("llama", num_hidden_layers=4)  # a finished run
    prune_model(again, recipe, batches(), resume_dir=tmp_path, progress=False)
    assert same(weights(uninterrupted), weights(again))


def test_another_run_is_not_resumed(tmp_path):
    prune_model(make("llama"), FLAGSHIP, batches(), resume_dir=tmp_path, progress=False)
    model = make("llama")
    with pytest.raises(ValueError, match="recipe"):
        prune_model(model, MamaPruningConfig(criterion="wanda"), batches(), resume_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="calibration"):
        prune_model(model, FLAGSHIP, [tokens(seed=9)], resume_dir=tmp_path, progress=False)
    with torch.no_grad():
        model.model.norm.weight += 1
    with pytest.raises(ValueError, match="model"):
        prune_model(model, FLAGSHIP, batches(), resume_dir=tmp_path, progress=False)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        prune_model(make("llama"), FLAGSHIP, batches(), resume_dir=tmp_path, progress=False)


def test_experts_and_encoder_decoders_are_refused(make_model):
    with pytest.raises(ValueError, match="experts"):
        prune_model(make_model("mixtral").eval(), FLAGSHIP, batches(), progress=False)
    prune_model(make_model("bert").eval(), FLAGSHIP, batches(), progress=False)  # an encoder works


def test_layers_that_change_an_output_in_place_are_refused():
    model = make("llama")
    mlp = model.model.layers[1].mlp
    mlp.register_forward_hook(lambda module, args, output: output.mul_(2))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj is changed in place"):
        prune_model(model, FLAGSHIP, batches(), progress=False)


def test_layers_that_are_more_than_a_sequence_are_refused(monkeypatch):
    model = make("llama")
    original = blocks.run

    def run(block, hidden, *rest):
        return original(block, hidden, *rest) + 1

    monkeypatch.setattr(blocks, "run", run)
    with pytest.raises(ValueError, match="one by one"):
        prune_model(model, FLAGSHIP, batches(), progress=False)
