"""A short run of each example script on a tiny model, and their size."""

from pathlib import Path

import mix6
import prune_grpo
import prune_sft
import pytest
from families import UNEVEN, masked
from transformers import AutoModelForCausalLM

from mama_hf import shrink, sparsity_report


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def model_dir(tmp_path):
    tokenizer = mix6.build_tokenizer()
    mix6.build_model(tokenizer, seed=0).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.mark.parametrize("script", ["prune_sft.py", "prune_grpo.py"])
def test_the_scripts_are_short(script):
    assert len((EXAMPLES / script).read_text(encoding="utf-8").splitlines()) < 100


@pytest.mark.parametrize("granularity", ["unstructured", "2:4"])
def test_prune_sft(granularity, model_dir, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a482913=123489\n" * 60)
    sizes = ["--steps", "6", "--batch-size", "2", "--window", "16"]
    sizes += ["--eval-window", "16", "--num-eval-windows", "2"]
    arguments = ["--model", model_dir, "--dataset", str(text), "--eval-file", str(text), "--granularity", granularity]
    results = prune_sft.main([*arguments, *sizes, "--output-dir", str(tmp_path / "out")])
    assert results["perplexity_after"] > 1
    assert results["perplexity_before"] > 1
    report = sparsity_report(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert report["targets"]["zeros"] == round(0.5 * report["targets"]["parameters"])
    assert all((row["n_of_m"] is not None) == row["target"] for row in report["layers"].values()) == (
        granularity == "2:4"
    )


def test_prune_grpo(model_dir, tmp_path, capsys):
    sizes = ["--steps", "3", "--batch-size", "4", "--num-generations", "2", "--max-completion-length", "3"]
    results = prune_grpo.main(["--model", model_dir, "--output-dir", str(tmp_path / "out"), *sizes])
    assert results["sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert 0 <= results["reward_after"] <= 1
    assert (tmp_path / "out" / "pruning_config.json").is_file()


# torch 2.13's exporter uses what torch 2.13 deprecates
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("cut", [UNEVEN, {(0, "neuron"): range(8), (1, "neuron"): range(8, 16)}])
def test_convert_onnx(cut, tmp_path):
    """Even and uneven models, by the exporter of transformers: ONNX Runtime computes the same."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="of the extra `test`")
    import convert_onnx

    shrink(masked("llama", cut)).save_pretrained(tmp_path / "small")
    results = convert_onnx.main(["--model", str(tmp_path / "small"), "--output-dir", str(tmp_path / "onnx")])
    assert results["difference"] < 1e-5
    assert results["bytes"] > 4 * shrink(masked("llama", cut)).num_parameters()
