"""The command line: `mama-hf report FOLDER`."""

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from .report import sparsity_report
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
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="count the zeros of a saved model")
    report.add_argument("folder", help="folder with config.json and safetensors weights")
    report.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    try:
        result = sparsity_report(arguments.folder)
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"mama-hf: {error}", style="red", markup=False)
        return 2
    sys.stdout.write(json.dumps(result.to_dict(), indent=2) + "\n" if arguments.json else str(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
