"""The commands on a saved tiny model: what they write and print, and how they refuse."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mama_hf import MamaPruningConfig, sparsity_report
from mama_hf.calibration import load_text
from mama_hf.cli import main
from mama_hf.evaluation import multiple_choice, perplexity


WORDS = ["<pad>", "<unk>"] + [f"w{index}" for index in range(40)]
TEXT = " ".join(f"w{index * index % 37}" for index in range(400))
ITEMS = [{"context": f"w{index}", "choices": ["w1", "w2 w3"], "answer": index % 2} for index in range(6)]


@pytest.fixture
def folder(tiny_llama, tmp_path) -> Path:
    """A saved model with its tokenizer, and a text beside it."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    tiny_llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def prune(folder: Path, *options: str) -> int:
    text = ["--calibration", str(folder / "text.txt"), "--num-windows", "4", "--window", "32"]
    return main(["prune", str(folder / "model"), str(folder / "out"), *text, *options])


def test_prune_saves_a_model_that_loads_and_its_report(folder, capsys):
    assert prune(folder, "--final-sparsity", "0.75") == 0
    assert "down_proj" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert sparsity_report(model)["targets"]["sparsity"] == 0.75
    report = json.loads((folder / "out" / "pruning_report.json").read_text())
    assert report["recipe"]["move_values"] == "least_squares"
    assert (folder / "out" / "tokenizer.json").is_file()


def test_options_change_a_recipe(folder):
    MamaPruningConfig(criterion="wanda", final_sparsity=0.25).save_pretrained(folder / "recipe")
    assert prune(folder, "--recipe", str(folder / "recipe"), "--granularity", "2:4", "--final-sparsity", "0.5") == 0
    saved = MamaPruningConfig.from_pretrained(folder / "out")
    assert (saved.criterion, saved.granularity, saved.final_sparsity) == ("wanda", "2:4", 0.5)
    assert saved.move_values == "none"
    assert prune(folder, "--criterion", "sparsegpt") == 0


@pytest.mark.parametrize(("multiple", "width"), [(None, 48), (1, 45), (20, 40)])
def test_multiple_of_rounds_the_neurons_that_stay(folder, multiple, width):
    options = [] if multiple is None else ["--multiple-of", str(multiple)]
    assert prune(folder, "--granularity", "neuron", "--final-sparsity", "0.3", *options) == 0
    assert main(["shrink", str(folder / "out"), str(folder / "small")]) == 0
    assert AutoModelForCausalLM.from_pretrained(folder / "small").config.intermediate_size == width


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--granularity", "neuron", "--multiple-of", "0"), "multiple_of=0"),
        (("--final-sparsity", "1.5"), "final_sparsity"),
        (("--criterion", "taylor"), "needs training"),
        (("--window", "100000"), "too few for a window"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_written(folder, options, reason, capsys):
    assert prune(folder, *options) == 2
    assert reason in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_prune_needs_a_calibration(folder, capsys):
    assert main(["prune", str(folder / "model"), str(folder / "out")]) == 2
    assert "--calibration is missing" in capsys.readouterr().err


def test_shrink_cuts_out_what_is_zero(folder, tiny_llama, capsys):
    assert main(["shrink", str(folder / "model"), str(folder / "small")]) == 2
    assert "nothing" in capsys.readouterr().err.lower()
    for layer in tiny_llama.model.layers:
        layer.mlp.down_proj.weight.data[:, :32] = 0
    tiny_llama.save_pretrained(folder / "model")
    assert main(["shrink", str(folder / "model"), str(folder / "small")]) == 0
    small = AutoModelForCausalLM.from_pretrained(folder / "small")
    assert small.config.intermediate_size == 32
    assert f"{small.num_parameters():,} after" in capsys.readouterr().out
    assert (folder / "small" / "tokenizer.json").is_file()


def test_eval_prints_what_the_functions_return(folder, capsys):
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)), encoding="utf-8")
    text = ["--text", str(folder / "text.txt"), "--window", "32", "--stride", "16"]
    assert main(["eval", str(folder / "model"), *text, "--items", str(folder / "items.jsonl")]) == 0
    printed = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    expected = perplexity(model, tokenizer, TEXT, 32, 16) | multiple_choice(model, tokenizer, ITEMS)
    assert printed == {name: value for name, value in expected.items() if not name.startswith("predictions")}
    assert main(["eval", str(folder / "model")]) == 2


def test_text_is_read_from_a_file_or_a_column(tmp_path):
    rows = [{"text": "one", "other": "two"}, {"text": "three", "other": "four"}]
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert load_text(data) == "one\n\nthree"
    assert load_text(data, column="other") == "two\n\nfour"
    assert load_text(data / "train.jsonl").startswith('{"text"')
    with pytest.raises(ValueError, match="no column 'body'; it has text, other"):
        load_text(data, column="body")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="has no text"):
        load_text(tmp_path / "empty.txt")
