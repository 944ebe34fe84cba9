"""Decoding by sparse kernels against dense ones on a CPU: tokens per second of a Llama-shaped model, random weights.

    python benchmarks/sparse_inference.py                          # 8 layers, hidden 4096: 9 GB of memory
    python benchmarks/sparse_inference.py --layers 2 --threads 1   # lighter: 3 GB
    python benchmarks/sparse_inference.py --model outputs/smollm2

Zeros are put at random places, as many in each Linear; where they are makes no difference to the time. Dense and
sparse runs alternate in one process and share the dense weights. Times are of one sequence, without the prompt.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mama_hf import sparse_inference
from mama_hf.sparse_inference import SparseLinear


PROMPT_LENGTH = 8


def build(args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    if args.model is not None:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 43 // 16,  # as in Llama 2: 11008 for 4096
            num_hidden_layers=args.layers,
            num_attention_heads=max(1, args.hidden // 128),
        )
        model = LlamaForCausalLM(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            module.weight.data *= torch.rand(module.weight.shape) >= args.sparsity
    return model.eval()


def decoding_seconds(model: PreTrainedModel, num_tokens: int) -> float:
    """Of so many tokens after a prompt and a first token."""
    prompt = torch.arange(3, 3 + PROMPT_LENGTH).unsqueeze(0)
    seconds = []
    for length in (1, 1 + num_tokens):
        start = time.perf_counter()
        model.generate(prompt, min_new_tokens=length, max_new_tokens=length, do_sample=False, pad_token_id=0)
        seconds.append(time.perf_counter() - start)
    return seconds[1] - seconds[0]


def measure(dense: PreTrainedModel, args: argparse.Namespace, num_threads: int) -> dict[str, Any]:
    torch.set_num_threads(num_threads)
    sparse = copy.deepcopy(dense, memo={id(parameter): parameter for parameter in dense.parameters()})
    start = time.perf_counter()
    sparse_inference(sparse)
    preparing = time.perf_counter() - start
    layers = [module for module in sparse.modules() if isinstance(module, SparseLinear)]
    with torch.no_grad():
        ids = torch.full((1, 1), 3)
        difference = float((dense(ids).logits - sparse(ids).logits).abs().max())
    rates: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(args.runs):
        for name, model in (("dense", dense), ("sparse", sparse)):
            rates[name].append(args.tokens / decoding_seconds(model, args.tokens))
    ratios = [second / first for first, second in zip(rates["dense"], rates["sparse"])]
    return {
        "threads": num_threads,
        "tokens_per_second": {name: {"median": statistics.median(all_), "all": all_} for name, all_ in rates.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "largest_difference_of_logits": difference,
        "replaced_linears": len(layers),
        "bytes_dense": sum(parameter.numel() * 4 for parameter in dense.parameters()),
        "bytes_added": sum(8 * layer.csr.values().numel() for layer in layers),
        "preparing_seconds": preparing,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder in place of random weights (examples/smollm2.py makes one)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sparse_inference.json"))
    args = parser.parse_args(argv)
    model = build(args)
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "model", "threads")}
    if args.model is not None:
        settings |= {"layers": model.config.num_hidden_layers, "hidden": model.config.hidden_size}
    result = {
        "settings": settings,
        "model": "random weights" if args.model is None else Path(args.model).name,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        "torch": torch.__version__,
        "results": [measure(model, args, num_threads) for num_threads in args.threads],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for row in result["results"]:
        rates = {name: values["median"] for name, values in row["tokens_per_second"].items()}
        print(
            f"{row['threads']} threads: dense {rates['dense']:.2f} and sparse {rates['sparse']:.2f} tokens/s, ratio "
            f"{row['ratio']['median']:.2f} ({row['ratio']['min']:.2f} to {row['ratio']['max']:.2f}), "
            f"{row['replaced_linears']} Linears replaced, logits differ by {row['largest_difference_of_logits']:.1e}"
        )
    return result


if __name__ == "__main__":
    main()
