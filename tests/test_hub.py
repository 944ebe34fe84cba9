"""Tests of `mama_hf.hub`. The calls that would reach the Hub are replaced; what they are given is checked."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mix6
import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, RepoUrl
from transformers import AutoModelForCausalLM, PreTrainedModel

from mama_hf import MamaPruningConfig
from mama_hf.checkpoint import describe, save_recipe_with
from mama_hf.hub import push_to_hub


URL = "https://huggingface.co/me/small/commit/0"
MODEL = {"config.json", "generation_config.json", "pruning_config.json", "README.md"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which each repository is a folder, with the files that were committed to it."""

    def create_repo(self: HfApi, repo_id: str, **kwargs: Any) -> RepoUrl:
        (tmp_path / repo_id).mkdir(parents=True, exist_ok=True)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self: HfApi, repo_id: str, operations: Any, **kwargs: Any) -> CommitInfo:
        for operation in operations:
            with operation.as_file() as file:
                (tmp_path / repo_id / operation.path_in_repo).write_bytes(file.read())
        return CommitInfo(commit_url=URL, commit_message="", commit_description="", oid="0")

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: str, **kwargs: Any) -> CommitInfo:
        shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
        return CommitInfo(commit_url=URL, commit_message="", commit_description="", oid="0")

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "me/small"


@pytest.fixture
def masked() -> PreTrainedModel:
    """A pruned model, as training leaves it."""
    model = mix6.build_model(mix6.build_tokenizer(), seed=0).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "layers" in name:
            parameter.data *= torch.rand(parameter.shape) > 0.8
    describe(model, MamaPruningConfig(final_sparsity=0.8), 0.8)
    save_recipe_with(model)
    return model


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def run_snippet(folder: Path) -> dict[str, Any]:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    return namespace


@pytest.mark.parametrize(("packed", "weights"), [(False, {"model.safetensors"}), (True, {"packed_model.safetensors"})])
def test_files_and_card(
    packed: bool, weights: set[str], uploaded: Path, masked: PreTrainedModel, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = mix6.build_tokenizer()
    options = {"tokenizer": tokenizer, "base_model": "them/big", "license": "mit"}
    assert push_to_hub(masked, "me/small", packed=packed, **options) == URL
    assert files(uploaded) - {"chat_template.jinja"} == MODEL | TOKENIZER | weights
    card = ModelCard.load(uploaded / "README.md")
    assert (card.data.base_model, card.data.license) == ("them/big", "mit")
    size = (uploaded / next(iter(weights))).stat().st_size
    assert (f"| bytes on disk | {size:,} |" in card.text) == packed
    namespace = run_snippet(uploaded)
    assert all(map(torch.equal, namespace["model"].state_dict().values(), masked.state_dict().values()))
    assert type(namespace["tokenizer"]) is type(tokenizer)
    assert len(capsys.readouterr().out.strip()) > 0


def test_shards(uploaded: Path, masked: PreTrainedModel) -> None:
    push_to_hub(masked, "me/small", packed=True, license="mit", max_shard_size="200KB")
    names = files(uploaded)
    assert {"packed_model.safetensors.index.json", "packed_model-00001-of-00003.safetensors"} <= names
    assert len(names) == len(MODEL) + 4
    run_snippet(uploaded)


def test_a_cut_model(uploaded: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    push_to_hub(make_model("llama", intermediate_size=40), "me/small", license="mit", dense=make_model("llama"))
    assert files(uploaded) == MODEL - {"pruning_config.json"} | {"model.safetensors"}
    assert "cut out of the weights" in (uploaded / "README.md").read_text()
    assert run_snippet(uploaded)["model"].config.intermediate_size == 40


def test_transformers_own_upload_has_the_recipe(uploaded: Path, masked: PreTrainedModel) -> None:
    masked.push_to_hub("me/small")
    assert files(uploaded) == MODEL | {"model.safetensors"}
    assert AutoModelForCausalLM.from_pretrained("me/small").config.mama["sparsity"] == 0.8
