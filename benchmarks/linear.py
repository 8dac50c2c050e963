"""Measure the products of linear layers, beside `F.linear`: ``python -m benchmarks.linear``.

`F.linear` and `mistral_hf.torch.linear.linear` in float32, for the layers of the 135M model and several numbers of
rows. The layers of a run hold 150 MB of weights, which therefore come from memory, as in a model. The two alternate,
and the medians are written to ``results/products.json``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mistral_hf.torch.linear import linear

from .harness import SUBJECT, TOLERANCES, environment, medians
from .report import finish, make_parser, output_path

SHAPES = ((1536, 576), (576, 1536), (576, 576), (192, 576), (49152, 576))  # output and input features
ROWS = (1, 2, 8, 64, 512)
LIBRARY = "F.linear"
Route = Callable[[nn.Module, Tensor], Tensor]
ROUTES: dict[str, Route] = {LIBRARY: lambda layer, states: layer(states), SUBJECT: linear}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`: measure GB/s of weights read and GFLOP/s for every shape and number of rows."""
    options = make_parser("linear", __doc__, "--repeats", "--tiny", "--output").parse_args(arguments)
    shapes, megabytes = (((24, 16),), 1) if options.tiny else (SHAPES, 150)
    repeats = options.repeats or 7
    record: dict[str, Any] = {"environment": environment(), "repeats": repeats, "products": []}
    for rows in ROWS:
        for outputs, inputs in shapes:
            entry = measure(rows, outputs, inputs, megabytes, repeats)
            record["products"].append(entry)
            rates = "  ".join(f"{route} {entry[route]['GB/s']:.1f} GB/s" for route in ROUTES)
            print(f"{rows:>4} rows, {outputs:>5} x {inputs:<5} {rates}  {entry['ratio']:.2f}x", flush=True)
    finish(output_path(options, "products"), record)


def measure(rows: int, outputs: int, inputs: int, megabytes: int, repeats: int) -> dict[str, Any]:
    """The sizes, the rates of both routes through layers that hold `megabytes`, and the subject's speedup."""
    count = max(1, round(megabytes * 1e6 / (4 * outputs * inputs))) if rows < 64 else 2
    layers = [nn.Linear(inputs, outputs, bias=False) for _ in range(count)]
    states = torch.randn(rows, inputs)

    @torch.no_grad()
    def run(route: Route) -> Tensor:
        for layer in layers:
            product = route(layer, states)
        return product

    runs = {name: partial(run, route) for name, route in ROUTES.items()}
    seconds = medians(f"{rows} rows, {outputs} x {inputs}", runs, repeats, TOLERANCES["float32"], LIBRARY)
    size = count * outputs * inputs
    rates = {
        name: {"GB/s": 4 * size / taken / 1e9, "GFLOP/s": 2 * rows * size / taken / 1e9}
        for name, taken in seconds.items()
    }
    ratio = seconds[LIBRARY] / seconds[SUBJECT]
    return {"rows": rows, "outputs": outputs, "inputs": inputs, **rates, "ratio": ratio}


if __name__ == "__main__":
    main()
