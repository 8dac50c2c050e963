"""Draw measured results: ``python -m benchmarks.plot RESULTS.json [--output PNG]``.

`benchmarks.run` gives time and peak memory of prompts by their length; `benchmarks.gpu` gives the speed-up.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .harness import REFERENCE, SUBJECT
from .report import RESULTS, make_parser

STYLES = {
    SUBJECT: {"label": "mistral_hf", "color": "tab:orange", "marker": "o"},
    REFERENCE: {"label": "Transformers", "color": "tab:gray", "marker": "s"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`."""
    parser = make_parser("plot", __doc__)
    parser.add_argument(
        "results", type=Path, help="JSON of benchmarks.run with the group 'lengths', or of benchmarks.gpu"
    )
    parser.add_argument("--output", type=Path, metavar="PNG", help="default: in benchmarks/results")
    options = parser.parse_args(arguments)
    try:
        record = json.loads(options.results.read_text())
        of_gpu = "device" in record["environment"]  # only benchmarks.gpu records one
        figure = draw_speedup(record) if of_gpu else draw(record)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options.output = options.output or RESULTS / ("gpu_speedup.png" if of_gpu else "prefill_length.png")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=150)
    print(f"written: {options.output}")


def draw(record: dict[str, Any]) -> Figure:
    """Two panels, time and memory, from a record of `benchmarks.run`.

    Raises:
        ValueError: The record does not hold at least two lengths.
    """
    results = [result for result in record["cases"] if result["group"] == "lengths" and "memory_ratio" in result]
    results.sort(key=lambda result: result["settings"]["length"])
    if len(results) < 2:
        raise ValueError(
            f"{len(results)} lengths with their peak memory are too few to plot: run benchmarks.run --cases lengths."
        )
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    time, memory = figure.subplots(1, 2)
    lengths = [result["settings"]["length"] for result in results]
    for version, style in STYLES.items():
        found = [result["versions"][version] for result in results]
        time.plot(lengths, [entry["seconds"]["median"] for entry in found], **style)
        memory.plot(lengths, [entry["peak_memory_bytes"] / 2**30 for entry in found], **style)
    time.plot(lengths, [result["limit"]["seconds"] for result in results], "k:", label="matrix rate of the machine")
    _finish(time, "time (s)", lengths)
    _finish(memory, "peak memory beyond the weights (GiB)", lengths)
    settings, machine = results[0]["settings"], record["environment"]
    shape = settings["shape"]
    figure.suptitle(
        f"Prefill, window of {settings['window']}: {shape['layers']} layers, hidden size {shape['hidden_size']},"
        f" {settings['dtype']}, {machine['cpu']}, {machine['threads']} threads",
        fontsize=10,
    )
    return figure


def draw_speedup(record: dict[str, Any]) -> Figure:
    """Two panels, decoding and prompts, from a record of `benchmarks.gpu`.

    Raises:
        ValueError: No case was measured with both versions.
    """
    results = [result for result in record["cases"] if result["speedup"]]
    if not results:
        raise ValueError("No case was measured with both versions: there is no speed-up to plot.")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for result in results:
            if result["group"].startswith(kind):
                batch = f", batch {result['settings']['batch']}" if kind == "decode" else ""
                label = result["group"].removeprefix(kind + "_") + batch
                lines.setdefault(label, []).append((result["settings"]["length"], result["speedup"]["median"]))
        for label, points in sorted(lines.items()):
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axes.axhline(1.0, color="tab:gray", linestyle=":")
        axes.set_title(kind)
        lengths = sorted({length for points in lines.values() for length, _ in points})
        _finish(axes, "times as fast as Transformers", lengths, logarithmic=False)
    settings, machine = results[0]["settings"], record["environment"]
    figure.suptitle(
        f"Window of {settings['window']}: {settings['shape']['layers']} layers, hidden size"
        f" {settings['shape']['hidden_size']}, {settings['dtype']}, {machine.get('gpu', machine['cpu'])}",
        fontsize=10,
    )
    return figure


def _finish(axes: Axes, label: str, lengths: Sequence[int], logarithmic: bool = True) -> None:
    axes.set_xscale("log", base=2)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel(label)
    axes.grid(True, which="major", alpha=0.3)
    if lengths:
        axes.legend(frameon=False)


if __name__ == "__main__":
    main()
