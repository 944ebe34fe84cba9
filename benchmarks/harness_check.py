"""`multiple_choice` against lm-evaluation-harness on the same items: scores and picks must be equal.

    pip install lm-eval
    python benchmarks/harness_check.py --items arc_easy_test.jsonl --num-items 200

Each line of --items has `question`, `choices` (texts) and `label` (index of the right one), and is put as in the
harness's `arc_easy`. The result is written to --output.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from oneshot import arc_items
from transformers import AutoModelForCausalLM, AutoTokenizer

from mama_hf.evaluation import multiple_choice


def harness(model: Any, tokenizer: Any, items: list[dict[str, Any]]) -> dict[str, Any]:
    """What lm-evaluation-harness finds, and what it picks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.jsonl"
        path.write_text("\n".join(json.dumps(item) for item in items), encoding="utf-8")
        task = {
            "task": "given_items",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16), tasks=[task], bootstrap_iters=100
        )
    samples = sorted(found["samples"]["given_items"], key=lambda sample: sample["doc_id"])
    scores = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    names = {"acc": "acc,none", "acc_norm": "acc_norm,none", "acc_stderr": "acc_stderr,none"}
    result = {name: found["results"]["given_items"][key] for name, key in names.items()}
    return {**result, "predictions": [score.index(max(score)) for score in scores]}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2", help="Hub id or folder (examples/smollm2.py makes one)")
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--num-items", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/harness_check.json"))
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    items = arc_items(args.items, args.num_items)
    ours, theirs = multiple_choice(model, tokenizer, items), harness(model, tokenizer, items)
    differing = sum(one != two for one, two in zip(ours["predictions"], theirs["predictions"]))
    result = {
        "num_items": len(items),
        "mama_hf": {name: ours[name] for name in ("acc", "acc_norm", "acc_stderr")},
        "lm_eval": {name: theirs[name] for name in ("acc", "acc_norm", "acc_stderr")},
        "lm_eval_version": lm_eval.__version__,
        "differing_predictions": differing,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    if differing or ours["acc"] != theirs["acc"] or ours["acc_norm"] != theirs["acc_norm"]:
        raise SystemExit("The two don't agree.")
    return result


if __name__ == "__main__":
    main()
