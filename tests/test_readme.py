"""Every code block of the README runs, or, where it is a shell command, names things that exist."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import datasets
import mix6
import pytest
import torch
import trl
from datasets import Dataset
from huggingface_hub import CommitInfo, HfApi
from transformers import AutoModelForCausalLM

from mama_hf import sparsity_report


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
CPU = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "disable_tqdm": True}
COMMIT = CommitInfo("https://huggingface.co/me/smollm2-sparse/commit/0", "", "", "0")


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A tiny model in place of the one on the Hub, tiny data in place of the data sets, CPU settings, few steps."""
    model_dir = tmp_path / "hub"
    tokenizer = mix6.build_tokenizer()
    mix6.build_model(tokenizer, seed=0).save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    rows = {"text": ["a482913=123489"] * 64}
    prompts = {"prompt": ["?482913="] * 64}

    def load_dataset(path: str, **kwargs: Any) -> Dataset:
        return Dataset.from_dict(prompts if path == "trl-lib/tldr" else rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("SFTConfig", "GRPOConfig"):
        original = getattr(trl, name)
        small = {"save_strategy": "no"} | ({"max_completion_length": 4} if name == "GRPOConfig" else {})
        monkeypatch.setattr(
            trl,
            name,
            lambda original=original, small=small, **kwargs: original(**{**kwargs, **CPU, **small, "max_steps": 4}),
        )
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(
        HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path, **kwargs: shutil.copytree(folder_path, tmp_path / repo_id) and COMMIT,
    )
    monkeypatch.chdir(tmp_path)
    return model_dir


@pytest.mark.parametrize("index", range(len(blocks("diff"))))
def test_the_two_line_diffs_apply_and_prune(index, hub):
    lines = blocks("diff")[index].splitlines()
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    added = [line for line in lines if line.startswith("+")]
    assert len(added) <= 4
    namespace: dict[str, Any] = {}
    exec(after.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(str(hub))), namespace)
    targets = sparsity_report(namespace["trainer"].model)["targets"]
    assert targets["zeros"] == round(0.5 * targets["parameters"])


def test_the_python_blocks_run_in_order(hub):
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    Path("calibration.txt").write_text("a482913=123489 " * 700)
    for block in blocks("python"):
        exec(block.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(str(hub))), namespace)
    assert namespace["sparsity_report"]("one-shot-model")["targets"]["sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert namespace["sparsity_report"]("sparse-model")["targets"]["sparsity"] == pytest.approx(0.7, abs=1e-4)
    packed, pushed = Path("packed-model"), Path("me/smollm2-sparse")
    assert {"config.json", "packed_model.safetensors", "pruning_config.json"} <= {
        path.name for path in packed.iterdir()
    }
    assert {"README.md", "packed_model.safetensors", "tokenizer.json"} <= {path.name for path in pushed.iterdir()}
    assert torch.equal(namespace["llm"].lm_head.weight, AutoModelForCausalLM.from_pretrained(pushed).lm_head.weight)
    whole_way = next(block for block in blocks("python") if "me/smollm2-small" in block)
    assert len(whole_way.splitlines()) < 30
    small, served = AutoModelForCausalLM.from_pretrained("small-model"), Path("me/smollm2-small")
    assert small.config.intermediate_size == mix6.build_model(mix6.build_tokenizer(), 0).config.intermediate_size // 2
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in served.iterdir()}
    merged = namespace["sparsity_report"]("merged")["layers"]
    queries = [row for name, row in merged.items() if "q_proj" in name or "v_proj" in name]
    assert sum(row["zeros"] for row in queries) >= 0.5 * sum(row["parameters"] for row in queries)


def test_the_shell_blocks_name_what_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in "\n".join(blocks("bash")).splitlines():
        for command in filter(str.strip, line.split("#")[0].split("&&")):
            words = shlex.split(command)
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), line
            elif words[0] == "python":
                source = (ROOT / words[1]).read_text(encoding="utf-8")
                for flag in (word for word in words if word.startswith("--")):
                    assert f'"{flag}"' in source, line
            else:
                assert words[:2] == ["pip", "install"], line


def test_the_tree_lists_the_files_that_there_are():
    tree = next(text for _, text in BLOCKS if "pyproject.toml" in text)
    listed, folder = set(), Path()
    for line in tree.splitlines():
        name = line.split("#")[0].rstrip()
        depth = (len(name) - len(name.lstrip())) // 2
        folder = Path(*folder.parts[:depth])
        if name.endswith("/"):
            folder /= name.strip().rstrip("/")
        elif name.strip():
            listed.add(str(folder / name.strip()))
    patterns = ("mama_hf/*.py", "examples/*.py", "benchmarks/*.py", "tests/*.py")
    there = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}
    assert {name for name in listed if name.endswith(".py")} == there
    assert all((ROOT / name).exists() for name in listed)
