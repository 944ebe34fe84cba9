"""`granularity="layer"`: the layers of least influence leave, and the model that is left is a stock one."""

import itertools

import pytest
import torch
from families import DECODERS, FAMILY_MODELS, make_family, random_ids
from transformers import AutoModelForCausalLM

from mama_hf import MamaPruningConfig, prune_model
from mama_hf.calibration import check_calibration
from mama_hf.dropping import block_influence


RECIPE = MamaPruningConfig(final_sparsity=0.25, granularity="layer")
DEPTH = {"gpt2": "n_layer"}


def make(name: str, layers: int = 4):
    """`layers` layers, the second of which changes little."""
    config = {DEPTH.get(FAMILY_MODELS[name][0], "num_hidden_layers"): layers}
    if "layer_types" in FAMILY_MODELS[name][1]:
        config["layer_types"] = ["full_attention", "sliding_attention"] * (layers // 2)
    if name == "smollm3":
        config["no_rope_layers"] = [0, 1] * (layers // 2)
    model = make_family(name, **config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("layers.1.", ".h.1.")) and parameter.ndim == 2:
                parameter.mul_(0.05)
            elif any(part in key for part in ("layers.1.", ".h.1.")) and key.endswith("bias"):
                parameter.zero_()
            elif "layers.1.post_" in key and "gemma" in name:
                parameter.fill_(-0.99)  # the norms that scale what the layer adds
    return model


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_left_is_a_stock_model(name, tmp_path):
    model, dense = make(name), make(name)
    report = prune_model(model, RECIPE, [random_ids(4, 24)], progress=False)
    assert [row["zeros"] for row in report["layers"].values()] == [0, 1, 0, 0]
    assert report.sparsity == model.config.mama["sparsity"] == 0.25
    assert model.config.num_hidden_layers == 3
    left = {key for key in dense.state_dict() if not any(part in key for part in ("layers.3.", ".h.3."))}
    assert model.state_dict().keys() == left
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(random_ids(), **settings), model.generate(random_ids(), **settings))
    assert torch.equal(  # the key-value cache counts the layers anew
        model.generate(random_ids(), **settings), model.generate(random_ids(), use_cache=False, **settings)
    )


def test_influence_is_one_minus_the_cosine():
    model = make("llama")
    batch = {"input_ids": random_ids(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    batch["attention_mask"][1, 7:] = 0
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
        valid = batch["attention_mask"].flatten().bool()
        rows = [state.flatten(0, 1)[valid] for state in states[:-1]]
        expected = [float((1 - torch.cosine_similarity(a, b)).mean()) for a, b in itertools.pairwise(rows)]
    influence = block_influence(model, check_calibration([batch], 64))
    assert influence[:-1] == pytest.approx(expected, abs=1e-5)  # the last state has the final norm in it


def test_excluded_layers_stay():
    model = make("llama")
    changes = {"final_sparsity": 0.5, "exclude_modules": ["layers.1", "layers.3"]}
    report = prune_model(model, MamaPruningConfig(granularity="layer", **changes), [random_ids()], progress=False)
    assert [row["zeros"] for row in report["layers"].values()] == [1, 0, 1, 0]
    changes["exclude_modules"] += ["layers.0"]
    with pytest.raises(ValueError, match=r"drops 2 layers, but exclude_modules=.* leaves 1 of 4"):
        prune_model(make("llama"), MamaPruningConfig(granularity="layer", **changes), [random_ids()], progress=False)


def test_what_can_not_work_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"resume_dir=.*has no use.*'layer'"):
        prune_model(make("llama"), RECIPE, [random_ids()], resume_dir=tmp_path, progress=False)


def test_a_layer_with_a_part_of_its_own_is_not_renumbered():
    """The first layer of ModernBERT has no norm; without it the class would load something else."""
    model = make_family("modernbert")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recipe = MamaPruningConfig(final_sparsity=0.5, granularity="layer", exclude_modules=["layers.1"])
    with pytest.raises(ValueError, match=r"layers \[1\] is not what its class makes"):
        prune_model(model, recipe, [random_ids()], progress=False)
    assert model.config.num_hidden_layers == 2
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
