"""One-shot structured pruning of SmolLM2-135M-Instruct: quality, parameters and bytes of what is left.

    python benchmarks/structured.py --data DIR --arc FILE --arc-items 200
    python benchmarks/structured.py --data DIR --methods mama --cases MATCHED    # a comparison at equal counts
    python benchmarks/structured_speed.py && python benchmarks/structured_plot.py

Calibration and evaluation are those of `benchmarks/oneshot.py`. What goes is cut out by `shrink`, and what is left is
evaluated in float32, then saved in bfloat16: `bytes` and `load_seconds` (the median of three, files in the cache) are
of that. `removed` counts the parameters that are gone. MATCHED stands for two sets of cases which differ in what goes,
but hardly in how many parameters that is: 22.4 % of the neurons (17.8 M), two of three heads (17.7 M) and 5 of 30
layers (17.7 M); 28.1 % of the neurons (22.4 M), 17 % of the neurons with one head of three (22.5 M), and 6 layers
(21.2 M). Each result is merged into --output at once; what is there already is not measured again, unless fields are
missing.
"""

import argparse
import copy
import functools
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import oneshot
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mama_hf import MamaPruningConfig, prune_model, shrink
from mama_hf.coupling import CoupledGroups, find_coupled_groups
from mama_hf.groups import entry_mask, group_sum, members_of, select_groups


# how groups are chosen, and what becomes of the values; None: by `taylor_scores`, no values moved
METHODS: dict[str, dict[str, str] | None] = {
    "mama": {"criterion": "mama", "move_values": "least_squares"},
    "mama-global": {"criterion": "mama", "move_values": "least_squares", "scope": "global"},
    "activation-least-squares": {"criterion": "wanda", "move_values": "least_squares"},
    "activation": {"criterion": "wanda"},
    "weight-norm": {"criterion": "magnitude"},
    "taylor": None,
}
BLOCK_INFLUENCE = "block-influence"  # the one rule for whole layers
CASES = ["dense 0", "neuron 0.25", "neuron 0.5", "head 0.33", "neuron+head 0.33", "layer 0.2"]
MATCHED = ["neuron 0.224", "head 0.667", "layer 0.167", "neuron 0.281", "neuron+head 0.17", "layer 0.2"]


def measure(args: argparse.Namespace, case: str, method: str) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    before, result = model.num_parameters(), {}
    granularity, level = split(case)
    if granularity != "dense":
        result = prune(args, model, tokenizer, granularity, method, level)
        model = model if granularity == "layer" else shrink(model)
    after = model.num_parameters()
    result |= {"parameters": before, "parameters_after": after, "removed": before - after}
    result["perplexity"] = oneshot.test_perplexity(args.data, model, tokenizer)
    if args.arc:
        result["arc_easy"] = oneshot.arc_scores(args.arc, args.arc_items, model, tokenizer)
    return result | served(model)


def split(case: str) -> tuple[str, float]:
    """("neuron", 0.25) of "neuron 0.25"."""
    granularity, level = case.split()
    return granularity, float(level)


def prune(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: Any, granularity: Any, method: str, level: float
) -> dict[str, Any]:
    windows = oneshot.calibration(args.data, tokenizer, args.seed)
    oneshot.reset_peak()
    start, cpu = time.perf_counter(), time.process_time()
    if method == "taylor":
        groups = find_coupled_groups(model, granularity)
        zero_groups(groups, kept_by(taylor_scores(args.model, args.data, args.seed), groups, level))
        rows = {}
    else:
        recipe = MamaPruningConfig(final_sparsity=level, granularity=granularity, **(METHODS.get(method) or {}))
        rows = prune_model(model, recipe, windows)["layers"]
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": oneshot.status_bytes("VmHWM"),
        "zeros_by_layer": [row["zeros"] for row in rows.values()],
    }


@functools.cache
def taylor_scores(folder: str, data: Path, seed: int) -> dict[str, Tensor]:
    """
    Writer of a layer's groups -> |sum of w * dL/dw over all that a group has| [G], L the language model's mean loss.
    First-order, as in LLM-Pruner: what the loss would change by if the group were not there. It is worked out once for
    all cases, whose times are without it but for the first.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = oneshot.calibration(data, AutoTokenizer.from_pretrained(folder), seed)
    for ids in windows:
        (model(input_ids=ids, labels=ids, use_cache=False).loss / len(windows)).backward()
    scores = {}
    for group in find_coupled_groups(model, "neuron+head"):
        terms = [group_sum(m, m.parameter.detach() * m.parameter.grad) for m in members_of(group)]
        scores[group.name] = torch.stack(terms).sum(dim=0).abs()
    return scores


def kept_by(scores: dict[str, Tensor], groups: list[CoupledGroups], level: float) -> list[Tensor]:
    """Bool [G] of each layer: the same share of the groups goes everywhere, as in `prune_model`."""
    kept = []
    for group in groups:
        multiple = 8 if group.kind == "neuron" else 1
        kept += select_groups([scores[group.name]], [scores[group.name]], level, "layer", group.kind, multiple)
    return kept


@torch.no_grad()
def zero_groups(groups: list[CoupledGroups], kept: list[Tensor]) -> None:
    for group, mask in zip(groups, kept):
        for member in members_of(group):
            member.parameter.mul_(entry_mask(member, mask))


def served(model: PreTrainedModel) -> dict[str, Any]:
    """Bytes of the weights' file in bfloat16, and the seconds to load it."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        for _ in range(3):
            start = time.perf_counter()
            AutoModelForCausalLM.from_pretrained(folder)
            seconds.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {"bytes": size, "load_seconds": statistics.median(seconds)}


def is_complete(args: argparse.Namespace, row: dict[str, Any]) -> bool:
    return "bytes" in row and (args.arc is None or "arc_easy" in row)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2", help="Hub id or folder (examples/smollm2.py makes one)")
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt and test.txt")
    parser.add_argument("--cases", nargs="+", default=CASES, help='as "neuron 0.25", or MATCHED')
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=["mama", "activation", "weight-norm", "taylor"],
        help="not for layers",
    )
    parser.add_argument("--arc", type=Path, help="arc_easy_test.jsonl, for the accuracy on it")
    parser.add_argument("--arc-items", type=int, help="only the first so many items")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/structured.json"))
    args = parser.parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for case in MATCHED if args.cases == ["MATCHED"] else args.cases:
        methods = {"dense": ["dense"], "layer": [BLOCK_INFLUENCE]}.get(split(case)[0], args.methods)
        for method in methods:
            if is_complete(args, oneshot.read(args.output).get(case, {}).get(method, {})):
                continue
            row = measure(args, case, method)
            oneshot.write(args.output, case, method, row)
            print(f"{case} {method}: perplexity {row['perplexity']:.2f}, {row['removed']:,} removed", flush=True)
            gc.collect()  # the model is part of a cycle
    return oneshot.read(args.output)


if __name__ == "__main__":
    main()
