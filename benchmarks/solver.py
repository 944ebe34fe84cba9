"""The solvers on one layer: CPU seconds and relative output error, against SparseGPT's in the same process.

    python benchmarks/solver.py

Inputs are correlated: X = Z A with a spectrum that falls like 1 / k, and a few inputs that are 30 times as large, as
in real models. Half of the tokens are for calibration; the error is measured on both halves. The ridge of
`prune_model` keeps a model from fitting its calibration too closely, at the price of a larger error of each layer;
"no ridge" is the solver alone. Times are CPU time, medians of --repeats, without the Gram matrix, which all methods
but magnitude need. --output is merged into.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mama_hf.masks import select
from mama_hf.rules import DEFAULT_ITERATIONS
from mama_hf.solvers import Inputs, Moments, System, admm, better_rows, least_squares, ridge_for, sparsegpt


Solver = Callable[[Tensor, Inputs, float], Tensor]


def by_wanda(weight: Tensor, inputs: Inputs, sparsity: float) -> Tensor:
    score = weight.abs() * inputs.gram.diagonal().sqrt()
    return select([score], [weight], sparsity, "row", None)[0]


def run_wanda(weight: Tensor, inputs: Inputs, sparsity: float) -> Tensor:
    return weight * by_wanda(weight, inputs, sparsity)


def run_sparsegpt(weight: Tensor, inputs: Inputs, sparsity: float) -> Tensor:
    return sparsegpt(weight, inputs.gram, sparsity)[0]


def run_least_squares(weight: Tensor, inputs: Inputs, sparsity: float) -> Tensor:
    moments, mask = Moments.plain(weight, inputs.gram), by_wanda(weight, inputs, sparsity)
    moved = least_squares(weight, mask, moments, DEFAULT_ITERATIONS, inputs.system(ridge_for(sparsity)))
    return better_rows(weight * mask, moved, moments)[0]


def run_admm(weight: Tensor, inputs: Inputs, sparsity: float) -> Tensor:
    return by_admm(weight, inputs, sparsity, inputs.system(ridge_for(sparsity)))


def run_admm_without_ridge(weight: Tensor, inputs: Inputs, sparsity: float) -> Tensor:
    return by_admm(weight, inputs, sparsity, System(inputs.gram, ridge=0.0))


def by_admm(weight: Tensor, inputs: Inputs, sparsity: float, system: System) -> Tensor:
    moments, sizes = Moments.plain(weight, inputs.gram), weight * system.scale

    def choose(scores: Tensor, share: float) -> Tensor:
        return select([scores], [sizes], sparsity * share, "row", None)[0]

    moved, mask = admm(weight, moments, choose, DEFAULT_ITERATIONS, DEFAULT_ITERATIONS // 2, system)
    return better_rows(weight * mask, moved, moments)[0]


SOLVERS: dict[str, Solver] = {
    "wanda": run_wanda,
    "wanda mask, least squares": run_least_squares,
    "sparsegpt": run_sparsegpt,
    "admm": run_admm,
    "admm, no ridge": run_admm_without_ridge,
}


def make_inputs(num_inputs: int, num_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [T, I] of two halves."""
    mixing = torch.randn(num_inputs, num_inputs, generator=generator)
    mixing /= torch.arange(1, num_inputs + 1).sqrt().unsqueeze(1)
    mixing[:, torch.randperm(num_inputs, generator=generator)[: max(1, num_inputs // 200)]] *= 30
    x = torch.randn(2 * num_tokens, num_inputs, generator=generator) @ mixing
    return x[:num_tokens], x[num_tokens:]


def measure(num_outputs: int, num_inputs: int, sparsity: float, repeats: int) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * 0.02
    seen, unseen = make_inputs(num_inputs, 4 * num_inputs, generator)
    inputs = Inputs(num_inputs, weight.device)
    inputs.add(seen)
    inputs.finish()
    results = {}
    for name, solver in SOLVERS.items():
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            values = solver(weight, inputs, sparsity)
            seconds.append(time.process_time() - start)
        errors = [
            float((x @ (values - weight).T).square().sum() / (x @ weight.T).square().sum()) for x in (seen, unseen)
        ]
        results[name] = {"seconds": statistics.median(seconds), "error": errors[0], "error_on_unseen": errors[1]}
    for row in results.values():
        row["time_ratio"] = row["seconds"] / results["sparsegpt"]["seconds"]
        row["error_ratio"] = row["error_on_unseen"] / results["sparsegpt"]["error_on_unseen"]
    return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "4096x4096"], help="outputs x inputs")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/solver.json"))
    args = parser.parse_args(argv)
    results = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
    results["threads"] = torch.get_num_threads()
    for shape in args.shapes:
        for sparsity in args.sparsities:
            num_outputs, num_inputs = map(int, shape.split("x"))
            rows = results[f"{shape}, {sparsity}"] = measure(num_outputs, num_inputs, sparsity, args.repeats)
            for name, row in rows.items():
                print(shape, sparsity, name, {key: round(value, 4) for key, value in row.items()}, flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
