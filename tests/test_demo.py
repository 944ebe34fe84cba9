import json

import demo
import mix6
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_a_short_demo_writes_its_results_model_and_plot(tmp_path):
    recorded = tmp_path / "recorded.json"
    recorded.write_text('{"7": {"seed": 7}}')
    sizes = ["--pretraining-steps", "2", "--steps", "8"]
    demo.main(["--output-dir", str(tmp_path), "--record", str(recorded), *sizes])
    results = json.loads((tmp_path / "results.json").read_text())
    assert json.loads(recorded.read_text()) == {"7": {"seed": 7}, "0": results}
    assert set(results) == {
        "seed",
        "pretrained",
        "dense",
        "magnitude",
        "mama",
        "auto",
        "neurons",
        "seconds",
        "versions",
    }
    for name in ("magnitude", "mama"):
        assert abs(results[name]["sparsity"] - 0.8) < 1e-4
        assert 0 <= results[name]["accuracy"] <= 1
    assert 0 < results["auto"]["sparsity"] <= 0.95
    assert "sparsity" not in results["dense"]
    before, after = results["neurons"]["before"], results["neurons"]["after"]
    assert before["parameters"] - after["parameters"] == round(0.75 * 2 * 192) * 3 * 64  # neurons x matrices x hidden
    assert after["bytes"] < before["bytes"]
    assert before["seconds"] > 0
    assert after["seconds"] > 0
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small-model")
    assert mix6.greedy_accuracy(small, mix6.build_tokenizer()) == results["neurons"]["accuracy"]
    with Image.open(tmp_path / "pruning.png") as image:
        assert image.size[0] > 600
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert mix6.greedy_accuracy(model, tokenizer) == results["mama"]["accuracy"]
    assert torch.isfinite(next(model.parameters())).all()
