"""Cost of the callback over the plain trainer: time and peak memory of the SFT example, as ratios.

    make bench                                           # or, once outputs/smollm2 is there:
    python benchmarks/overhead.py --dataset train.txt    # any text will do; the licence if not given

Each run is a process of its own. Plain and pruned runs alternate, and ratios are taken pair by pair: of the wall time,
of the CPU time (the fairer one on a shared machine) and of the peak memory. Masks change every second step between a
tenth and seven tenths of the run, and count in the time.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from mama_hf import MamaPruningCallback, MamaPruningConfig


ROOT = Path(__file__).resolve().parents[1]


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One run in this process: wall and CPU seconds in `train`, and the peak of the resident memory in bytes."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    ids = torch.tensor(tokenizer(Path(args.dataset).read_text(encoding="utf-8"), verbose=False).input_ids)
    rows = ids[: len(ids) // args.window * args.window].view(-1, args.window)
    start, end = max(1, round(0.1 * args.steps)), round(0.7 * args.steps)
    recipe = MamaPruningConfig(start=start, end=end, update_every=2, criterion=args.criterion)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir="outputs/overhead",
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            max_length=args.window,
            learning_rate=1e-4,
            use_cpu=not torch.accelerator.is_available(),
            bf16=False,
            activation_checkpointing=False,
            logging_steps=args.steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
        callbacks=[MamaPruningCallback(recipe)] if args.child == "pruned" else None,
    )
    before = time.process_time()
    seconds = trainer.train().metrics["train_runtime"]
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - before,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def run_child(kind: str, argv: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, *argv, "--child", kind]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def summarize(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2", help="Hub id or folder (examples/smollm2.py makes one)")
    parser.add_argument("--dataset", default=str(ROOT / "LICENSE"), help="a text file to train on")
    parser.add_argument("--criterion", default="mama")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/overhead.json"))
    parser.add_argument("--child", choices=("plain", "pruned"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        result: dict[str, Any] = measure(args)
        print(json.dumps(result))
        return result
    pairs = []
    for index in range(args.pairs):
        pair = {kind: run_child(kind, argv) for kind in ("plain", "pruned")}
        pairs.append(pair)
        plain, pruned = pair["plain"], pair["pruned"]
        print(
            f"pair {index + 1}/{args.pairs}, plain and pruned: "
            f"{plain['seconds']:.1f} s and {pruned['seconds']:.1f} s, "
            f"CPU {plain['cpu_seconds']:.1f} s and {pruned['cpu_seconds']:.1f} s, "
            f"{plain['peak_bytes'] / 1e9:.2f} GB and {pruned['peak_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
    result = {
        "settings": {
            key: value for key, value in vars(args).items() if key not in ("output", "child", "dataset", "model")
        },
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine()},
        "torch": torch.__version__,
        "time_ratio": summarize([pair["pruned"]["seconds"] / pair["plain"]["seconds"] for pair in pairs]),
        "cpu_time_ratio": summarize([pair["pruned"]["cpu_seconds"] / pair["plain"]["cpu_seconds"] for pair in pairs]),
        "memory_ratio": summarize([pair["pruned"]["peak_bytes"] / pair["plain"]["peak_bytes"] for pair in pairs]),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name in ("time_ratio", "cpu_time_ratio", "memory_ratio"):
        ratio = result[name]
        print(f"{name}: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})")
    return result


if __name__ == "__main__":
    main()
