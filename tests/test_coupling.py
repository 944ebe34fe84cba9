"""Groups of coupled weights: they partition each parameter, and each is what nothing else of its layer depends on."""

import pytest
import torch
from families import DECODERS, FAMILY_MODELS, make_family, random_ids
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel

from mama_hf.coupling import CoupledGroups, Member, find_coupled_groups, group_index
from mama_hf.modeling_mama import FAMILIES


NUM_NEURONS, NUM_HEADS = 24, 4


def fill_(member: Member, groups: list[int], value: float | None) -> None:
    """Set what `groups` have in a parameter to `value`, or to noise."""
    positions = member.index[groups].flatten()
    shape = list(member.parameter.shape)
    shape[member.dim] = len(positions)
    values = torch.randn(shape) if value is None else torch.full(shape, value)
    member.parameter.data.index_copy_(member.dim, positions, values)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_ids()).logits


def test_every_family_has_a_model() -> None:
    assert {model_type for model_type, _ in FAMILY_MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_members_partition_their_parameters(name: str) -> None:
    model = make_family(name)
    groups = find_coupled_groups(model, "neuron+head")
    assert [(g.layer, g.kind, g.num_groups) for g in groups] == [
        (layer, kind, count) for layer in range(2) for kind, count in (("neuron", NUM_NEURONS), ("head", NUM_HEADS))
    ]
    parameters = dict(model.named_parameters())
    members = [member for group in groups for member in (*group.readers, *group.writers)]
    for member in members:
        assert parameters[member.name] is member.parameter
        assert member.index.dtype == torch.int64
        assert sorted(member.index.flatten().tolist()) == list(range(member.parameter.shape[member.dim]))
    assert len({group.name for group in groups}) == len(groups)
    assert len({(member.name, member.dim) for member in members}) == len(members)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_biases_of_the_readers_are_members(name: str) -> None:
    model = make_family(name)
    groups = find_coupled_groups(model, "neuron+head")
    linears = {name for name, _ in model.named_parameters()}
    for group in groups:
        weights = {member.name.removesuffix(".weight") for member in group.readers if member.name.endswith("weight")}
        biases = {member.name.removesuffix(".bias") for member in group.readers if member.name.endswith("bias")}
        assert biases == {weight for weight in weights if f"{weight}.bias" in linears}
        assert model.get_submodule(group.name) is group.writer_module


@pytest.mark.parametrize("kind", ["neuron", "head"])
@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_a_group_is_closed(name: str, kind: str) -> None:
    """With the columns at zero the rows don't matter; with all else at zero the group still does, and only through
    its own rows: a wrong index would mix it with another group."""
    model = make_family(name)
    chosen = [1, 2]
    for group in find_coupled_groups(model, kind):
        before = logits(model)
        for member in group.writers:
            fill_(member, chosen, 0.0)
        silent = logits(model)
        assert not torch.allclose(silent, before, atol=1e-4)
        for member in group.readers:
            fill_(member, chosen, None)
        torch.testing.assert_close(logits(model), silent, rtol=0, atol=0)
        rest = [index for index in range(group.num_groups) if index not in chosen]
        for member in group.readers:
            fill_(member, rest[:1], None)
        assert not torch.allclose(logits(model), silent, atol=1e-4)


@pytest.mark.parametrize("kind", ["neuron", "head"])
@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_rows_of_a_group_feed_its_columns_only(name: str, kind: str) -> None:
    """What the writer's module sees changes at the group's columns, and nowhere else, with the group's rows."""
    model = make_family(name)
    (group, *_) = find_coupled_groups(model, kind)
    seen = []
    hook = group.writer_module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    logits(model)
    for member in group.readers:
        fill_(member, [2], None)
        logits(model)
        changed = (seen[0] != seen[-1]).flatten(0, -2).any(dim=0).nonzero().flatten().tolist()
        assert changed == group.writers[0].index[2].tolist()
    hook.remove()


def test_index_of_fused_blocks() -> None:
    assert group_index(2, [2, 1, 1]).tolist() == [[0, 1, 4, 6], [2, 3, 5, 7]]
    assert group_index(2, [3]).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert group_index(3, [1, 1]).tolist() == [[0, 3], [1, 4], [2, 5]]


def kept(groups: list[CoupledGroups]) -> list[tuple[int, str]]:
    return [(group.layer, group.kind) for group in groups]


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (None, [(0, "neuron"), (0, "head"), (1, "neuron"), (1, "head")]),
        (["gate_proj"], [(0, "head"), (1, "head")]),
        (["layers.0.self_attn.k_proj", "layers.1.mlp.down_proj"], [(0, "neuron"), (1, "head")]),
        (r"model\.layers\.1\..*", [(0, "neuron"), (0, "head")]),
    ],
)
def test_exclude_modules(exclude: str | list[str] | None, expected: list[tuple[int, str]]) -> None:
    assert kept(find_coupled_groups(make_family("llama"), "neuron+head", exclude)) == expected


def test_the_base_model_alone() -> None:
    model = make_family("gpt2").transformer
    assert [group.name for group in find_coupled_groups(model, "head")] == ["h.0.attn.c_proj", "h.1.attn.c_proj"]


@pytest.mark.parametrize("name", DECODERS)
def test_a_group_has_the_queries_of_its_key(name: str) -> None:
    model = make_family(name)
    (group, *_) = find_coupled_groups(model, "head")
    sizes = {member.name.split(".")[-2]: member.index.shape[1] for member in group.readers}
    queries = group.writers[0].index.shape[1]
    assert queries == 32 // NUM_HEADS if "gemma" not in name and name != "qwen3" else queries == 16
    assert sum(sizes.values()) == queries + 2 * (queries * NUM_HEADS // model.config.num_attention_heads)


def test_unknown_names_are_refused() -> None:
    config = CLIPTextConfig(vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1)
    with pytest.raises(
        ValueError, match=r"model_type='clip_text_model' are not known\. Known are llama, mistral,.*phi3"
    ):
        find_coupled_groups(CLIPTextModel(config), "neuron")
    with pytest.raises(
        ValueError, match=r"granularity='2:4' has no coupled groups\. Use one of neuron, head, neuron\+"
    ):
        find_coupled_groups(make_family("llama"), "2:4")


def test_adapters_and_wrong_configs_are_refused() -> None:
    model = make_family("llama")
    with pytest.raises(ValueError, match=r"neurons and heads of a PeftModel.*merge_and_unload"):
        find_coupled_groups(get_peft_model(model, LoraConfig(target_modules=["up_proj"])), "neuron")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj is a Linear, .*[mM]erge"):
        find_coupled_groups(model, "neuron")
    other = make_family("llama")
    other.model.layers[1].self_attn.k_proj = nn.Linear(32, 12)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj\.weight has 12 features.*make 16"):
        find_coupled_groups(other, "head")
