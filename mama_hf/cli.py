"""The command line: `mama-hf prune`, `mama-hf shrink`, `mama-hf report`, `mama-hf eval`."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from . import commands
from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*): arguments; those of the process if not given.

    Returns:
        `int`: the exit status: 0, or 2 for input that can't work (the reason is on standard error).
    """
    parser = argparse.ArgumentParser(prog="mama-hf", description="Pruning for Hugging Face models.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for add in (_add_prune, _add_shrink, _add_report, _add_eval):
        add(subparsers)
    arguments = parser.parse_args(argv)
    try:
        sys.stdout.write(arguments.run(arguments))
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"mama-hf: {error}", style="red", markup=False)
        return 2
    return 0


def _add_prune(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("prune", help="prune a model in one shot, without training")
    parser.set_defaults(run=commands.prune)
    parser.add_argument("model", help="Hub id or folder of a causal language model")
    parser.add_argument("output", help="folder for the pruned model")
    _add_text(parser, "--calibration", "what the model is shown")
    parser.add_argument("--num-windows", type=int, default=64, help="calibration windows (default: %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the windows' places in the text")
    recipe = parser.add_argument_group("recipe (see MamaPruningConfig)")
    recipe.add_argument("--recipe", help="folder or Hub id with a pruning_config.json, which the options below change")
    recipe.add_argument("--final-sparsity", type=float, help="fraction of zeros (default: 0.5)")
    recipe.add_argument("--criterion", help='default: "mama"')
    recipe.add_argument("--granularity", help='default: "unstructured"; "2:4" keeps 2 of 4')
    recipe.add_argument("--scope")
    recipe.add_argument("--allocation")
    recipe.add_argument("--move-values", help='default: "least_squares"')
    recipe.add_argument("--exclude-modules", nargs="+")
    recipe.add_argument("--multiple-of", type=int, help="of which the neurons that a layer keeps are (default: 8)")
    parser.add_argument("--iterations", type=int, help="solver steps: quality against time")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: as they are stored)")
    parser.add_argument("--device", help="where blocks are worked on, one by one")
    parser.add_argument("--resume-dir", help="folder for finished blocks: a run that was stopped continues from there")


def _add_shrink(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("shrink", help="cut out the neurons and heads that are zero as a whole")
    parser.set_defaults(run=commands.shrink_model)
    parser.add_argument("model", help="Hub id or folder of a causal language model")
    parser.add_argument("output", help="folder for the smaller model")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: as they are stored)")


def _add_report(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("report", help="count the zeros of a saved model")
    parser.set_defaults(run=commands.report)
    parser.add_argument("folder", help="folder with config.json and safetensors weights")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_eval(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("eval", help="perplexity of a text, accuracy on multiple-choice items")
    parser.set_defaults(run=commands.evaluate)
    parser.add_argument("model", help="Hub id or folder of a causal language model")
    _add_text(parser, "--text", "whose perplexity is measured")
    parser.add_argument("--window", type=int, default=512, help="tokens that the model sees at once")
    parser.add_argument("--stride", type=int, help="tokens from one window to the next (default: the window)")
    parser.add_argument("--items", help="JSON lines with context, choices and answer (index of the right choice)")
    parser.add_argument("--batch-size", type=int, default=16, help="choices in one forward pass")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: as they are stored)")
    parser.add_argument("--device", default="cpu")


def _add_text(parser: argparse.ArgumentParser, name: str, purpose: str) -> None:
    parser.add_argument(name, help=f"text file or Hub data set {purpose}")
    parser.add_argument(f"{name}-config", help="configuration of the data set")
    parser.add_argument(f"{name}-split", default="train", help="its split (default: %(default)s)")
    parser.add_argument(f"{name}-column", default="text", help="its column (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(main())
