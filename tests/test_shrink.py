"""Masked and shrunk models compute the same, in every architecture; what comes out is as small as computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DECODERS, ENCODERS, FAMILY_MODELS, UNEVEN, Cut, make_family, mask_, masked, random_ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mama_hf import MamaForCausalLM, MamaPruningConfig, prune_model, shrink, sparsity_report
from mama_hf.coupling import CoupledGroups, find_coupled_groups
from mama_hf.modeling_mama import MamaConfig, MamaForMaskedLM, MamaModel, family_of


NEURONS = {(0, "neuron"): range(8, 16), (1, "neuron"): range(8)}
HEADS = {(0, "head"): [0, 2], (1, "head"): [1, 3]}


def padded() -> dict[str, torch.Tensor]:
    """Two rows of 12 and of 7 tokens, padded on the left."""
    ids, mask = random_ids(), torch.ones(2, 12, dtype=torch.long)
    ids[1, :5], mask[1, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_equal(small: PreTrainedModel, model: PreTrainedModel) -> None:
    """Logits to 1e-5 of their size, and the same greedy tokens, with a cache and with padding."""
    batch = padded()
    with torch.no_grad():
        expected, given = model(**batch).logits, small(**batch).logits
        real = batch["attention_mask"].bool()
        assert (given - expected)[real].abs().max() <= 1e-5 * expected[real].abs().max()
        if model.can_generate():
            past = small(input_ids=batch["input_ids"][:1, :8], use_cache=True).cache
            rest = small(input_ids=batch["input_ids"][:1, 8:], cache=past).logits
            torch.testing.assert_close(
                rest, model(input_ids=batch["input_ids"][:1]).logits[:, 8:], atol=1e-4, rtol=1e-5
            )
            options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
            tokens = model.generate(**batch, **options)
            assert torch.equal(small.generate(**batch, **options), tokens)
            assert torch.equal(small.generate(**batch, **options, cache_implementation="static"), tokens)


def num_cut(groups: list[CoupledGroups], cut: Cut) -> int:
    """Parameters that the groups in `cut` have."""
    count = 0
    for group in groups:
        share = len(list(cut.get((group.layer, group.kind), []))) / group.num_groups
        count += sum(round(member.parameter.numel() * share) for member in (*group.readers, *group.writers))
    return count


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_uneven_layers(name: str) -> None:
    model = masked(name, UNEVEN)
    small = shrink(model)
    assert isinstance(small, MamaForMaskedLM if name in ENCODERS else MamaForCausalLM)
    assert isinstance(small, type(model))
    assert_equal(small, model)
    groups = find_coupled_groups(model, "neuron+head")
    assert small.num_parameters() == model.num_parameters() - num_cut(groups, UNEVEN)
    assert [group.num_groups for group in find_coupled_groups(small, "neuron+head")] == [11, 3, 22, 2]


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_even_neurons_give_the_native_class(name: str, tmp_path: Path) -> None:
    model = masked(name, NEURONS)
    small = shrink(model)
    assert type(small) is type(model)
    assert type(small.config) is type(model.config)
    assert getattr(small.config, family_of(small.config).width) == 16
    assert_equal(small, model)
    small.save_pretrained(tmp_path)
    assert_equal(type(model).from_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_even_heads(name: str, tmp_path: Path) -> None:
    """Native where the config can hold the size of a head, which must not follow from the number of heads any more."""
    model = masked(name, HEADS)
    small = shrink(model)
    free = family_of(model.config).free_heads
    assert type(small) is type(model) if free else isinstance(small.config, MamaConfig)
    assert_equal(small, model)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    assert_equal(loaded, model)
    if free:
        assert (loaded.config.num_attention_heads, loaded.config.num_key_value_heads) == (4, 2)


def test_heads_that_the_native_config_refuses() -> None:
    """Llama wants a hidden size that is a multiple of the number of heads, and 32 is none of 6; Qwen2 does not."""
    cut = {(0, "head"): [3], (1, "head"): [0]}
    model = masked("llama", cut)
    assert isinstance(shrink(model), MamaForCausalLM)
    assert_equal(shrink(model), model)
    assert shrink(masked("qwen2", cut)).config.head_dim == 4


@pytest.mark.parametrize("name", DECODERS)
def test_the_columns_alone_make_a_group_idle(name: str) -> None:
    model = make_family(name)
    mask_(model, UNEVEN, parts=("writers",))
    assert_equal(shrink(model), model)


def test_the_rows_alone_make_a_group_idle_where_they_are_multiplied() -> None:
    model = make_family("llama")
    mask_(model, UNEVEN, parts=("readers",))
    assert [group.num_groups for group in find_coupled_groups(shrink(model), "neuron+head")] == [11, 3, 22, 2]
    assert_equal(shrink(model), model)
    model.model.layers[0].mlp.up_proj.bias.data[3] = 1.0  # with a bias it is not idle
    assert find_coupled_groups(shrink(model), "neuron")[0].num_groups == 12
    plain = make_family("gpt2")
    mask_(plain, NEURONS, parts=("readers",))
    with pytest.raises(ValueError, match="nothing to cut"):  # act(0) need not be zero
        shrink(plain)


def test_one_group_stays() -> None:
    model = masked("llama", {(0, "neuron"): range(24), (1, "head"): range(4)})
    small = shrink(model)
    assert [group.num_groups for group in find_coupled_groups(small, "neuron+head")] == [1, 4, 24, 1]
    assert_equal(small, model)


def test_shrunk_again() -> None:
    model = masked("qwen2", UNEVEN)
    small = shrink(model)
    mask_(small, {(0, "neuron"): range(5), (1, "neuron"): range(4, 20), (0, "head"): [1]})
    smaller = shrink(small)
    assert type(smaller) is type(make_family("qwen2"))  # layers are alike again: 6 neurons, 2 key-value heads
    assert_equal(smaller, small)
    mask_(small, {(0, "neuron"): range(7)})
    assert isinstance(shrink(small), MamaForCausalLM)


@pytest.mark.parametrize(("change", "zeros"), [(None, "0.0%"), ("2:4", "50.0%")])
def test_nothing_to_cut_is_refused(change: str | None, zeros: str) -> None:
    model = make_family("qwen2")
    if change is not None:
        for linear in (module for module in model.model.layers.modules() if isinstance(module, nn.Linear)):
            linear.weight.data.view(-1, 8)[:, [0, 1, 6, 7]] = 0.0
            linear.weight.data[1::2] = linear.weight.data[1::2].roll(4, dims=1)
    with pytest.raises(ValueError, match=rf"nothing to cut: {zeros} of the weights.*N:M patterns can't be cut out"):
        shrink(model)


def test_other_models_are_refused() -> None:
    """A head that no Auto class here knows, and weights on two devices."""
    model = masked("llama", NEURONS)

    class Own(type(model)):  # type: ignore[misc]
        pass

    model.__class__ = Own
    with pytest.raises(ValueError, match=r"Own can't be shrunk.*AutoModelForCausalLM"):
        shrink(model)
    spread = masked("llama", NEURONS)
    spread.lm_head.to("meta")
    with pytest.raises(ValueError, match="spread over cpu, meta"):
        shrink(spread)


def test_the_base_model() -> None:
    model = masked("llama", UNEVEN).model
    small = shrink(model)
    assert isinstance(small, MamaModel)
    with torch.no_grad():
        torch.testing.assert_close(small(input_ids=random_ids())[0], model(input_ids=random_ids())[0])


def test_what_is_kept() -> None:
    model = masked("llama-tied", UNEVEN).to(torch.bfloat16)
    model.model.norm.to(torch.float32)
    model.model.norm.weight.data += 1e-5
    model.config.mama = {"recipe": {"final_sparsity": 0.5}, "sparsity": 0.5}
    model.set_attn_implementation("eager")
    model.generation_config.max_new_tokens = 17
    model.model.embed_tokens.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = shrink(model.train())
    assert {name: parameter.dtype for name, parameter in small.named_parameters()} == {
        name: parameter.dtype for name, parameter in model.named_parameters()
    }
    assert torch.equal(small.model.norm.weight, model.model.norm.weight)
    assert small.config.mama == model.config.mama
    assert small.config._attn_implementation == "eager"
    assert small.config.dtype == model.config.dtype
    assert small.generation_config.max_new_tokens == 17
    assert small.training
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert not small.lm_head.weight.requires_grad
    assert small.model.norm.weight.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_saved_and_loaded_by_the_auto_class(tmp_path: Path) -> None:
    model = masked("gemma3", UNEVEN)
    shrink(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MamaForCausalLM)
    assert AutoConfig.from_pretrained(tmp_path).base_model_type == "gemma3_text"
    assert_equal(loaded, model)


def test_shrinks_on_the_way(make_model: Callable[..., PreTrainedModel]) -> None:
    """The 2-layer Llama of the other tests, whose layers have one config: cutting one layer makes it uneven."""
    model = make_model("llama").eval()
    mask_(model, {(1, "neuron"): range(32)})
    small = shrink(model)
    assert [layer["intermediate_size"] for layer in small.config.layer_sizes] == [64, 32]
    assert_equal(small, model)


@pytest.mark.parametrize("scope", ["layer", "global"])  # a stock architecture, and layers that differ
def test_what_prune_model_prunes_is_cut_and_keeps_its_recipe(tiny_llama: Any, tmp_path: Path, scope: str) -> None:
    recipe = MamaPruningConfig(granularity="neuron+head", final_sparsity=0.5, scope=scope, multiple_of=1)
    prune_model(tiny_llama, recipe, [torch.arange(3, 60).view(3, 19)], progress=False)
    small = shrink(tiny_llama)
    small.save_pretrained(tmp_path)
    assert MamaPruningConfig.from_pretrained(tmp_path) == recipe
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, tiny_llama.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert sparsity_report(tiny_llama)["groups"]["neuron"]["sparsity"] == 0.5
    assert small.num_parameters() < tiny_llama.num_parameters()
