"""Tests of `mama_hf.card`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaModel, PreTrainedModel

from mama_hf import MamaPruningConfig, save_packed, sparsity_report
from mama_hf.card import model_card
from mama_hf.checkpoint import describe


MakeModel = Callable[..., PreTrainedModel]
METRICS = {
    "perplexity": {"before": 24.49, "after": 32.37, "on": "WikiText-2 (test)"},
    "reward": {"after": 0.9, "on": "mix6"},
}
SPEED = {"machine": "2 cores of a laptop", "unit": "tokens/s", "before": 4.0, "after": 6.0}


@pytest.fixture
def make_sparse(make_model: MakeModel) -> Callable[..., PreTrainedModel]:
    """`make_sparse(kept, name)`: of each four neighbours in a Linear those at `kept` are not zero; with a recipe."""

    def make(kept: list[int] = [0], name: str = "llama") -> PreTrainedModel:  # noqa: B006
        model = make_model(name).eval()
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layer" in key:
                parameter.data *= torch.tensor([float(i in kept) for i in range(4)]).repeat(parameter.shape[1] // 4)
        describe(model, MamaPruningConfig(final_sparsity=1 - len(kept) / 4), 1 - len(kept) / 4)
        return model

    return make


def test_what_is_in_it(make_sparse: Callable, make_model: MakeModel) -> None:
    model, dense = make_sparse(), make_model("llama")
    card = model_card(
        model,
        "me/small",
        base_model="them/big",
        license="mit",
        dense=dense,
        metrics=METRICS,
        speed=SPEED,
    )
    text = card.text
    parameters, size = (sparsity_report(model)["total"][key] for key in ("parameters", "bytes"))
    before, after = (sum(int(p.count_nonzero()) for p in part.parameters()) for part in (dense, model))
    assert after < before
    for part in (
        "[them/big](https://huggingface.co/them/big)",
        "arxiv.org/abs/2505.14052",
        "Sparsity asked for: 0.75; reached: 0.7500.",
        '"final_sparsity": 0.75',
        f"| parameters | {parameters:,} | {parameters:,} |",
        f"| of them not zero | {before:,} | {after:,} |",
        f"| bytes in memory | {size:,} | {size:,} |",
        "| tokens/s on 2 cores of a laptop | before | this model | ratio |",
        "| | 4.0 | 6.0 | 1.50 |",
        "| perplexity | WikiText-2 (test) | 24.49 | 32.37 |",
        "| reward | mix6 | not measured | 0.9 |",
    ):
        assert part in text, part
    assert "on disk" not in text
    assert "import mama_hf" not in text


def test_metadata_reads_back(make_sparse: Callable, tmp_path: Path) -> None:
    card = model_card(make_sparse(), "me/small", base_model="them/big", license="mit", metrics=METRICS)
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.license, data.library_name) == ("them/big", "mit", "transformers")
    assert (data.pipeline_tag, data.model_name) == ("text-generation", "small")
    assert {"mama-hf", "pruning"} <= set(data.tags)
    results = {result.metric_type: result for result in data.eval_results}
    assert (results["perplexity"].metric_value, results["perplexity"].dataset_type) == (32.37, "wikitext-2-test")
    assert results["reward"].metric_value == 0.9


@pytest.mark.parametrize(
    ("kept", "packed_bytes", "present", "absent"),
    [
        ([0], None, ["neither smaller in memory nor faster", "2:4 patterns", "not measured"], ["on disk"]),
        (
            [0, 1],
            99,
            ["neither smaller", "2:4 patterns", "on disk, a zero takes one bit", "| bytes on disk | 99 |"],
            [],
        ),
        ([0, 1, 2], None, ["neither smaller", "so expect no speed-up"], ["2:4", "sparse_inference"]),
        ([0, 1, 2, 3], None, ["as large and as fast as before"], ["neither smaller"]),
    ],
)
def test_says_what_zeros_bring(
    kept: list[int], packed_bytes: int | None, present: list[str], absent: list[str], make_sparse: Callable
) -> None:
    text = model_card(make_sparse(kept), "me/small", license="mit", packed_bytes=packed_bytes).text
    assert [part for part in present if part not in text] == []
    assert [part for part in absent if part in text] == []


def test_many_unstructured_zeros(make_sparse: Callable) -> None:
    model = make_sparse()
    model.model.layers[0].mlp.up_proj.weight.data[0] = 1
    assert "decodes faster on a CPU where it measures so" in model_card(model, "me/small", license="mit").text


def test_a_cut_model(make_model: MakeModel) -> None:
    dense, cut = make_model("llama"), make_model("llama", intermediate_size=40)
    text = model_card(cut, "me/small", license="mit", dense=sparsity_report(dense)).text
    assert "cut out of the weights: the model is smaller, and less is computed" in text
    assert "neither smaller" not in text
    assert "The recipe is not recorded." in text
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (dense, cut)]
    assert f"| parameters | {counts[0]:,} | {counts[1]:,} |" in text


def test_base_and_license(make_sparse: Callable, tmp_path: Path, caplog: Any) -> None:
    model = make_sparse()
    model.config.name_or_path = "them/big"
    data = model_card(model, "me/small").data
    assert (data.base_model, data.license) == ("them/big", None)
    assert "set license=" in caplog.text
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    card = model_card(model, "me/small", base_model=str(tmp_path))
    assert (card.data.base_model, card.data.license) == (None, "apache-2.0")
    model.config.name_or_path = str(tmp_path)
    assert model_card(model, "me/small", license="mit").data.base_model is None


def test_license_from_the_cache(make_sparse: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")
    asked: list[tuple[str, str]] = []

    def cached(*names: str) -> str:
        asked.append(names)
        return str(tmp_path / "README.md")

    monkeypatch.setattr("mama_hf.card.try_to_load_from_cache", cached)
    assert model_card(make_sparse(), "me/small", base_model="them/big").data.license == "gemma"
    assert asked == [("them/big", "README.md")]


def snippet(card: ModelCard) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    return code


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    ("name", "auto"),
    [("llama", "AutoModelForCausalLM"), ("gpt2", "AutoModelForCausalLM"), ("bert", "AutoModelForMaskedLM")],
)
def test_the_snippet_works_as_printed(
    name: str, auto: str, is_packed: bool, make_sparse: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_sparse([0], name)
    save = save_packed if is_packed else PreTrainedModel.save_pretrained
    save(model, "me/small")
    code = snippet(model_card(model, "me/small", license="mit", packed_bytes=1 if is_packed else None))
    assert ("import mama_hf" in code) == is_packed
    assert f"{auto}.from_pretrained" in code
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert type(namespace["model"]) is type(model)
    assert all(map(torch.equal, namespace["model"].state_dict().values(), model.state_dict().values()))


def test_the_snippet_of_a_base_model(make_sparse: Callable) -> None:
    model = make_sparse().model
    assert type(model) is LlamaModel
    assert "from transformers import AutoModel\n" in snippet(model_card(model, "me/small", license="mit"))


def test_other_keys_are_refused(make_sparse: Callable) -> None:
    with pytest.raises(ValueError, match=r"speed has the keys \['after'\]. Set after, before, machine, unit\."):
        model_card(make_sparse(), "me/small", speed={"after": 1.0})
    with pytest.raises(ValueError, match=r"metrics\['loss'\] has the keys .* Set after, on, and if you like before"):
        model_card(make_sparse(), "me/small", metrics={"loss": {"after": 1.0, "on": "x", "when": "now"}})
