"""The benchmarks of structured pruning, on a tiny model: what they compute by themselves, and a short run of each."""

import json
from pathlib import Path
from typing import Any

import mix6
import pytest
import recovery
import structured
import structured_speed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mama_hf.coupling import find_coupled_groups
from mama_hf.groups import members_of


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Arguments that name a model, texts of its kind and the output."""
    tokenizer = mix6.build_tokenizer()
    mix6.build_model(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name in ("valid.txt", "test.txt"):
        (tmp_path / name).write_text("a482913=123489 " * 80, encoding="utf-8")
    return ["--model", str(tmp_path / "model"), "--data", str(tmp_path), "--output", str(tmp_path / "results.json")]


def test_structured_measures_what_is_not_there(paths: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    row = {"question": "a1", "choices": ["1", "2"], "label": 0}
    (tmp_path / "arc.jsonl").write_text(f"{json.dumps(row)}\n" * 3, encoding="utf-8")
    (tmp_path / "results.json").write_text('{"neuron 0.5": {"taylor": {"perplexity": 1.0}}}', encoding="utf-8")
    arguments = [*paths, "--cases", "dense 0", "neuron 0.5", "layer 0.5", "--methods", "mama", "taylor"]
    arguments += ["--arc", str(tmp_path / "arc.jsonl"), "--arc-items", "2"]
    results = structured.main(arguments)
    assert {(case, method) for case, rows in results.items() for method in rows} == {
        *{("dense 0", "dense"), ("neuron 0.5", "mama"), ("neuron 0.5", "taylor"), ("layer 0.5", "block-influence")}
    }
    assert results["neuron 0.5"]["taylor"]["perplexity"] > 1
    for method in ("mama", "taylor"):
        assert results["neuron 0.5"][method]["removed"] == 96 * 3 * 64 * 2  # neurons x matrices x hidden x layers
    assert results["layer 0.5"]["block-influence"]["bytes"] < results["dense 0"]["dense"]["bytes"]
    assert results["dense 0"]["dense"]["arc_easy"]["num_items"] == 2
    monkeypatch.setattr(structured, "measure", None)
    assert structured.main(arguments) == results


@pytest.mark.parametrize("kind", ["neuron", "head"])
def test_taylor_scores_are_the_slope_of_the_loss(kind: str, paths: list[str], tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    scores = structured.taylor_scores(folder, tmp_path, 0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    windows = structured.oneshot.calibration(tmp_path, AutoTokenizer.from_pretrained(folder), 0)
    group = find_coupled_groups(model, kind)[1]
    losses = []
    for factor in (1.02, 0.98 / 1.02):  # of all that the third group has, one after the other
        for member in members_of(group):
            positions = member.index[2]
            member.parameter.data.index_copy_(
                member.dim, positions, member.parameter.data.index_select(member.dim, positions) * factor
            )
        with torch.no_grad():
            losses.append(sum(float(model(input_ids=ids, labels=ids).loss) for ids in windows) / len(windows))
    slope = abs(losses[0] - losses[1]) / 0.04  # the loss is in float32
    assert float(scores[group.name][2]) == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("case", ["neuron 0.25", "head 0.5", "neuron+head 0.25", "layer 0.5"])
def test_sizes_fall_as_computed(case: str, paths: list[str], tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    small = structured_speed.cut(dense, case)
    found = structured_speed.sizes(small, str(tmp_path / "small"))
    assert found == structured_speed.computed(dense, case)
    assert found["parameters"] < structured_speed.sizes(dense, str(tmp_path / "dense"))["parameters"]


def test_speed_is_paired(paths: list[str], tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    small = structured_speed.cut(dense, "neuron 0.5").eval()
    models = {"dense": dense, "shrunk": small, "ideal": structured_speed.from_scratch(small)}
    args = structured_speed.argparse.Namespace(runs=2, block_tokens=8, prefill_tokens=8, decode_tokens=2)
    with torch.no_grad():
        result = structured_speed.time_models(models, args)
    assert len(result) == 5
    for timing in result.values():
        assert set(timing["tokens_per_second"]) == set(models)
        assert 0 < timing["speed_up"]["min"] <= timing["speed_up"]["median"] <= timing["speed_up"]["max"]


def test_recovery(paths: list[str], tmp_path: Path) -> None:
    arguments = [*paths, "--cases", "dense", "neuron 0.5", "unstructured 0.7", "--steps", "2", "--window", "16"]
    arguments += ["--learning-rates", "1e-3", "--starts", str(tmp_path / "starts")]
    results = recovery.main(arguments)
    assert {case: len(rows) for case, rows in results.items()} == {"dense": 1, "neuron 0.5": 3, "unstructured 0.7": 3}
    rows = results["unstructured 0.7"]
    assert len({row["zeros"] for row in rows.values()}) == 1
    assert len({row["before"] for row in rows.values()}) == 1
    assert len({row["after"] for row in rows.values()}) == 3
    whole = results["dense"]["sft, learning rate 0.001, 2 steps, seed 0"]["parameters"]
    for row in results["neuron 0.5"].values():
        assert row["parameters"] == whole - 96 * 3 * 64 * 2
        gap = row["before"] - results["dense"]["sft, learning rate 0.001, 2 steps, seed 0"]["before"]
        assert row["recovered"] == pytest.approx((row["before"] - row["after"]) / gap)
        assert "recovered_of_trained" in row
