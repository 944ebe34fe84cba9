"""What cutting is worth in time and memory: SmolLM2-135M-Instruct shrunk, against dense and against the ideal.

    python benchmarks/structured_speed.py --threads 1 2

Speed depends on the shapes alone: each case of `structured.py` loses its first neurons, heads or layers here, without
calibration, and is shrunk. The ideal is a model of the same config with random weights. Rounds of dense, shrunk and
ideal alternate in one process, in float32; the ratios are of one round. Measured are `blocks` (the forward of 1 x 1024
tokens without the output layer), `prefill` (512 tokens, as 1 x 512 and as 8 x 64) and `decode` (tokens after a prompt
of 8, batch 1 and 8). `peak_bytes` is the highest resident memory (Linux) of a fresh process that loads the model,
reads 512 tokens and writes 8. Parameters, bytes (in bfloat16) and FLOPs of the FFN are compared with what can be
computed beforehand.
"""

import argparse
import copy
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import oneshot
import torch
from structured import CASES, split, zero_groups
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from mama_hf import MamaPruningConfig, prune_model, shrink
from mama_hf.coupling import find_coupled_groups
from mama_hf.groups import num_kept


PROMPT_LENGTH = 8


def cut(model: Any, case: str) -> Any:
    """The model of a case, smaller by what costs nothing to choose."""
    granularity, level = split(case)
    model = copy.deepcopy(model)
    if granularity == "layer":
        tokens = torch.arange(3, 19).unsqueeze(0)
        prune_model(model, MamaPruningConfig(final_sparsity=level, granularity="layer"), [tokens], progress=False)
        return model
    groups = find_coupled_groups(model, granularity)
    counts = [num_kept(group.num_groups, level, 8 if group.kind == "neuron" else 1) for group in groups]
    zero_groups(groups, [torch.arange(group.num_groups) < count for group, count in zip(groups, counts)])
    return shrink(model)


def from_scratch(model: Any) -> Any:
    return type(model)(copy.deepcopy(model.config)).eval()


def tasks(args: argparse.Namespace) -> dict[str, tuple[int, Callable[[Any], float]]]:
    """Name -> (tokens, seconds that a model needs for them)."""
    return {
        "blocks": (args.block_tokens, lambda model: forward_seconds(model.base_model, 1, args.block_tokens)),
        "prefill, batch 1": (args.prefill_tokens, lambda model: prefill_seconds(model, 1, args.prefill_tokens)),
        "prefill, batch 8": (args.prefill_tokens, lambda model: prefill_seconds(model, 8, args.prefill_tokens // 8)),
        "decode, batch 1": (args.decode_tokens, lambda model: decode_seconds(model, 1, args.decode_tokens)),
        "decode, batch 8": (8 * args.decode_tokens, lambda model: decode_seconds(model, 8, args.decode_tokens)),
    }


def prefill_seconds(model: Any, batch: int, length: int) -> float:
    return forward_seconds(model, batch, length, use_cache=True, logits_to_keep=1)


def token_ids(model: Any, batch: int, length: int) -> Tensor:
    return torch.arange(batch * length).view(batch, length) % model.config.vocab_size


def forward_seconds(model: Any, batch: int, length: int, **kwargs: Any) -> float:
    ids = token_ids(model, batch, length)
    start = time.perf_counter()
    model(input_ids=ids, **kwargs)
    return time.perf_counter() - start


def decode_seconds(model: Any, batch: int, num_tokens: int) -> float:
    """Of `num_tokens` steps, each of one token a sequence."""
    output = model(input_ids=token_ids(model, batch, PROMPT_LENGTH), use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(num_tokens):
        output = model(input_ids=output.logits[:, -1].argmax(dim=-1, keepdim=True), cache=output.cache, use_cache=True)
    return time.perf_counter() - start


def time_models(models: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Task -> tokens/s of each model, and paired ratios: seconds of dense / shrunk, and of ideal / shrunk."""
    result = {}
    for name, (num_tokens, seconds_of) in tasks(args).items():
        for model in models.values():
            seconds_of(model)  # once, to warm up
        rounds = [{key: seconds_of(model) for key, model in models.items()} for _ in range(args.runs)]
        result[name] = {
            "tokens_per_second": {key: spread([num_tokens / row[key] for row in rounds]) for key in models},
            "speed_up": spread([row["dense"] / row["shrunk"] for row in rounds]),
            "share_of_ideal": spread([row["ideal"] / row["shrunk"] for row in rounds]),
        }
    return result


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def sizes(model: Any, folder: str) -> dict[str, int]:
    """Parameters, bytes of the tensors on disk in bfloat16, and FLOPs of the FFNs for 16 tokens. Saves to `folder`."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    path = Path(folder) / "model.safetensors"
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    counter = FlopCounterMode(display=False)
    with counter:
        for layer in model.base_model.layers:
            layer.mlp(torch.zeros(1, 16, model.config.hidden_size))
    return {
        "parameters": model.num_parameters(),
        "bytes": path.stat().st_size - header,
        "ffn_flops": counter.get_total_flops(),
    }


def computed(model: Any, case: str) -> dict[str, int]:
    """What `sizes` must be for a case, from the dense model's config (Llama's) and sizes."""
    granularity, level = split(case)
    config, total = model.config, model.num_parameters()
    hidden, width, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    if granularity == "layer":
        layers = num_kept(layers, level)
        gone = (config.num_hidden_layers - layers) * sum(p.numel() for p in model.base_model.layers[0].parameters())
    else:
        heads = config.num_key_value_heads
        if "neuron" in granularity:
            width = num_kept(width, level, 8)
        heads_gone = heads - num_kept(heads, level) if "head" in granularity else 0
        queries = config.num_attention_heads // heads
        head = 2 * (queries + 1) * config.head_dim * hidden  # query and output; key and value
        gone = layers * (3 * hidden * (config.intermediate_size - width) + heads_gone * head)
    return {"parameters": total - gone, "bytes": 2 * (total - gone), "ffn_flops": 2 * 16 * 3 * hidden * width * layers}


def serve(folder: str) -> int:
    """Peak of the resident memory of this process, in which nothing else has run."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.set_num_threads(1)
    with torch.no_grad():
        prefill_seconds(model, 1, min(512, model.config.max_position_embeddings))
        decode_seconds(model, 1, 8)
    return oneshot.status_bytes("VmHWM")


def measure(dense: Any, case: str, args: argparse.Namespace) -> dict[str, Any]:
    small = dense if case == "dense 0" else cut(dense, case).eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        found = sizes(small, folder)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            row = {**found, "peak_bytes": fresh.submit(serve, folder).result(), "seconds": {}}
        if case == "dense 0":
            return row
        row["as_computed"] = {key: found[key] == value for key, value in computed(dense, case).items()}
        models = {"dense": dense, "shrunk": small, "ideal": from_scratch(small)}
        for num_threads in args.threads:
            torch.set_num_threads(num_threads)
            row["seconds"][str(num_threads)] = time_models(models, args)
    return row


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2", help="Hub id or folder (examples/smollm2.py makes one)")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--block-tokens", type=int, default=1024)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/structured_speed.json"))
    args = parser.parse_args(argv)
    dense: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(args, key) for key in ("runs", "block_tokens", "prefill_tokens", "decode_tokens")}
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__}
    oneshot.write(args.output, "settings", "all", {**settings, **machine})
    for case in args.cases:
        row = measure(dense, case, args)
        oneshot.write(args.output, "cases", case, row)
        print(f"{case}: {row['parameters']:,} parameters, {row['peak_bytes']:,} bytes at most in memory")
        for num_threads, timings in row["seconds"].items():
            for name, timing in timings.items():
                ratio, share = timing["speed_up"], timing["share_of_ideal"]["median"]
                spread_of = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
                print(
                    f"  {num_threads} threads, {name}: {spread_of} times as fast, {share:.2f} of the ideal", flush=True
                )
    return json.loads(args.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
