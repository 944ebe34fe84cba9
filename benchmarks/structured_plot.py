"""Quality over speed of what `structured.py` and `structured_speed.py` have measured, one line a method.

python benchmarks/structured_plot.py
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import oneshot


matplotlib.use("Agg")
from matplotlib import pyplot


MARKERS = {"neuron": "o", "head": "s", "neuron+head": "D", "layer": "^"}


def points(results: dict[str, Any], speeds: dict[str, Any], task: str) -> dict[str, list[tuple[float, float, str]]]:
    """Method -> (speed-up on one thread, perplexity, granularity), slowest first."""
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for case, row in speeds["cases"].items():
        if case in results and "1" in row["seconds"]:
            speed_up = row["seconds"]["1"][task]["speed_up"]["median"]
            for method, result in results[case].items():
                lines.setdefault(method, []).append((speed_up, result["perplexity"], case.split()[0]))
    return {method: sorted(line) for method, line in lines.items()}


def draw(results: dict[str, Any], speeds: dict[str, Any], path: Path) -> None:
    figure, panels = pyplot.subplots(1, 2, sharey=True, figsize=(10, 4.5))
    for axes, (task, label) in zip(panels, {"blocks": "forward of the blocks", "decode, batch 1": "decoding"}.items()):
        for method, line in points(results, speeds, task).items():
            drawn = axes.plot([x for x, _, _ in line], [y for _, y, _ in line], label=method)[0]
            for x, y, granularity in line:
                axes.plot(x, y, marker=MARKERS[granularity], color=drawn.get_color())
        dense = results["dense 0"]["dense"]["perplexity"]
        axes.axhline(dense, color="black", linestyle=":", label="dense")
        # by weight norm, neurons end above a million
        axes.set(xlabel=f"speed-up, {label}, one thread", yscale="log", ylim=(20, 1500))
        axes.grid(alpha=0.3)
    for granularity, marker in MARKERS.items():
        panels[1].plot([], [], color="gray", linestyle="", marker=marker, label=granularity)
    panels[0].set(ylabel="WikiText-2 perplexity", title="One-shot and cut out, SmolLM2-135M-Instruct")
    panels[1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", type=Path, default=Path("benchmarks/results/structured.json"))
    parser.add_argument("--speed", type=Path, default=Path("benchmarks/results/structured_speed.json"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/structured.png"))
    args = parser.parse_args(argv)
    draw(oneshot.read(args.quality), oneshot.read(args.speed), args.output)


if __name__ == "__main__":
    main()
