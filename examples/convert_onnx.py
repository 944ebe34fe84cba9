"""A shrunk model as ONNX: written by the exporter of transformers, run by ONNX Runtime, compared with the original.

pip install onnx onnxscript onnxruntime
python examples/convert_onnx.py --model small-model --output-dir small-onnx
"""

import argparse
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from transformers import AutoModelForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter

import mama_hf  # noqa: F401  (models with uneven layers load too)


TOLERANCE = 1e-3  # of the largest logit


def batch(model: Any, num_rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(model.config.vocab_size, (num_rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args(argv)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    example = {**batch(model, 2, 16), "use_cache": False}
    exported = OnnxExporter().export(model, example, config=OnnxConfig(dynamic=True))
    exported.save_pretrained(args.output_dir)

    session = onnxruntime.InferenceSession(args.output_dir / "model.onnx")
    inputs = batch(model, 3, 21)  # neither the size nor the length of the example
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    given = torch.from_numpy(session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0])
    difference = float((given - expected).abs().max() / expected.abs().max())
    size = sum(path.stat().st_size for path in args.output_dir.glob("model.onnx*"))
    print(f"{args.output_dir}: {size:,} bytes; the logits differ by {difference:.1e} of the largest.")
    if difference > TOLERANCE:
        raise SystemExit(f"That is more than {TOLERANCE}.")
    return {"bytes": size, "difference": difference}


if __name__ == "__main__":
    main()
