"""Measure training steps and 4-bit loading: ``python -m benchmarks.training --help``.

A step is forward, backward and AdamW, with gradient checkpointing in both versions, on the same data: one text of 4096
tokens, or texts of different lengths packed into that many tokens. The subject computes its loss from all logits, as
the reference does, or in chunks.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from mistral_hf import BUNDLED_CHECKPOINT, MistralForCausalLM

from .harness import SUBJECT, environment, in_fresh_process, measure, measure_limits
from .models import MISTRAL_7B, TINY, Shape
from .report import finish, make_parser, measure_cases, output_path, print_header, print_result, read_json, resized
from .workloads import Training

FOUR_LAYERS = Shape(layers=4)
TEXTS = (1280, 64, 700, 12, 256, 400, 90, 1294)  # tokens of packed texts


@dataclass(frozen=True, kw_only=True)
class Step(Training):
    """One step of 4096 tokens.

    Attributes:
        packed: Whether the tokens are several texts, with positions that restart.
        chunk: Tokens whose logits the subject's loss holds at a time, or None for all tokens together.
    """

    length: int = 4096
    window: int | None = 1024
    shape: Shape = FOUR_LAYERS
    group: str = "training"
    repeats: int = 3
    peak_memory: bool = True
    packed: bool = False
    chunk: int | None = None

    def load(self, version: str, attention: str) -> Any:
        """The model, with gradient checkpointing."""
        model = super().load(version, attention)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if version == SUBJECT:
            model.config.loss_chunk_size = self.chunk
        return model

    def inputs(self) -> dict[str, Tensor]:
        """Inputs of the model, ``[1, length]`` each."""
        inputs = super().inputs()
        if self.packed:
            lengths = torch.tensor(TEXTS) * self.length // sum(TEXTS)
            lengths[-1] += self.length - lengths.sum()
            inputs["position_ids"] = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
            inputs["labels"] = inputs["labels"].masked_fill(inputs["position_ids"] == 0, -100)
        return inputs


CASES = tuple(
    Step(
        name="_".join(["step", *(["packed"] if packed else []), *(["chunked"] if chunk else [])]),
        title=f"4096 {'packed ' if packed else ''}tokens{', the loss in chunks of 512' if chunk else ''}",
        packed=packed,
        chunk=chunk,
    )
    for packed in (False, True)
    for chunk in (None, 512)
)

FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
QUANTIZATION = "quantization"


def measure_format(name: str, shape: Shape) -> dict[str, Any]:
    """Load a random model, and compute the perplexity of the bundled checkpoint; for a fresh process.

    Args:
        name: One of `FORMATS`.
        shape: Sizes of the random model.

    Returns:
        Seconds of loading; bytes of the loaded model, and of one with 32 layers; perplexity of the held-out text.
    """
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model = MistralForCausalLM(shape.config(dtype="bfloat16"))
        model.to(torch.bfloat16).save_pretrained(folder)
        _load(BUNDLED_CHECKPOINT, name)
        start = time.perf_counter()
        model = _load(folder, name)
        seconds = time.perf_counter() - start
        total, inside = _stored_bytes(model), _stored_bytes(model.model.layers)
    return {
        "format": name,
        "load_seconds": seconds,
        "bytes": total,
        "bytes_of_32_layers": total + (32 - shape.layers) * inside // shape.layers,
        "perplexity": _perplexity(_load(BUNDLED_CHECKPOINT, name)),
    }


def _stored_bytes(module: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers, with the constants of quantized parameters."""
    total = sum(buffer.nbytes for buffer in module.buffers())
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        constants = [] if state is None else [state.absmax, state.code]
        if state is not None and state.nested:
            constants += [state.state2.absmax, state.state2.code, state.offset]
        total += sum(part.nbytes for part in (parameter, *constants))
    return total


def _load(checkpoint: Any, name: str) -> Any:
    quantization = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **FORMATS[name]) if FORMATS[name] else None
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, quantization_config=quantization)


@torch.no_grad()
def _perplexity(model: Any, length: int = 512) -> float:
    ids = AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)(
        (BUNDLED_CHECKPOINT / "heldout.txt").read_text(encoding="utf-8"), verbose=False
    )["input_ids"]
    blocks = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return math.exp(model.eval()(blocks, labels=blocks).loss)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`."""
    options = parse(arguments)
    record: dict[str, Any] = {"cases": {}, QUANTIZATION: {}, **read_json(options.output)}
    record["environment"] = environment()
    limits = measure_limits(tiny=options.tiny)
    print_header(record["environment"], limits)
    cases = resized((case for case in CASES if case.name in options.cases), options)
    measure_case = partial(measure, limits=limits, attention="sdpa", memory=not options.tiny)
    new: dict[str, Any] = {"cases": []}
    disagreements = measure_cases(cases, measure_case, new, print_result, None)
    record["cases"] |= {result["name"]: {**result, "limits": asdict(limits)} for result in new["cases"]}
    for name in FORMATS if QUANTIZATION in options.cases else ():
        shape = replace(MISTRAL_7B, layers=2)
        found = measure_format(name, TINY) if options.tiny else in_fresh_process(measure_format, name, shape)
        record[QUANTIZATION][name] = found
        print(
            f"{name:<12} loaded in {found['load_seconds']:.1f} s; 32 layers:"
            f" {found['bytes_of_32_layers'] / 2**30:.2f} GiB; perplexity {found['perplexity']:.2f}",
            flush=True,
        )
    finish(options.output, record, disagreements)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; the output keeps its other cases."""
    names = [*(case.name for case in CASES), QUANTIZATION]
    parser = make_parser("training", __doc__, "--repeats", "--tiny", "--output")
    parser.add_argument("--cases", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args(arguments)
    options.output = output_path(options, "training")
    return options


if __name__ == "__main__":
    main()
