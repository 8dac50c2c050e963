"""The command line: ``mistral-hf generate | chat | serve | run | convert | info``; each imports what it needs."""

import logging
import os
import platform
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .bundled import BUNDLED_CHECKPOINT

app = typer.Typer(
    name="mistral-hf",
    help="Run Mistral checkpoints through Hugging Face Transformers with mistral_hf.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

PACKAGES = (
    *("mistral_hf", "torch", "transformers", "tokenizers", "safetensors", "accelerate", "bitsandbytes", "flash-attn"),
    *("peft", "trl", "mistral-common", "jax", "flax", "tensorflow", "keras"),
)

BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class Dtype(str, Enum):
    """Dtypes of the weights; ``auto`` is that of the checkpoint."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelOption = Annotated[
    str, typer.Option("--model", help="Folder or hub id of a checkpoint.", show_default="the bundled checkpoint")
]

DtypeOption = Annotated[Dtype, typer.Option(help="Dtype of the weights; auto is that of the checkpoint.")]

DeviceMapOption = Annotated[
    str | None, typer.Option(help="Device, such as auto, cpu or cuda:1.", show_default="the accelerator, or the CPU")
]

AttentionOption = Annotated[
    str | None, typer.Option(help="Attention back end; `mistral-hf info` lists them.", show_default="sdpa")
]

FourBitOption = Annotated[bool, typer.Option("--load-in-4bit", help="Quantize to 4 bits (NF4) with bitsandbytes.")]

SampleOption = Annotated[
    bool | None,
    typer.Option("--do-sample/--greedy", help="Sample tokens, or take the likeliest.", show_default="checkpoint's"),
]

TemperatureOption = Annotated[float | None, typer.Option(min=0.01, help="Above 1 is more random, below 1 less.")]
TopPOption = Annotated[float | None, typer.Option(min=0, max=1, help="Sample from this share of probability.")]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Seed that makes sampling repeatable.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    model: ModelOption = str(BUNDLED_CHECKPOINT),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens to add.")] = 100,
    dtype: DtypeOption = Dtype.auto,
    device_map: DeviceMapOption = None,
    attn_implementation: AttentionOption = None,
    load_in_4bit: FourBitOption = False,
    do_sample: SampleOption = None,
    temperature: TemperatureOption = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from this many of the likeliest tokens.")] = None,
    top_p: TopPOption = None,
    min_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Smallest probability, relative to that of the likeliest token.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0.01, help="Above 1 discourages repetition.")] = None,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Beams of a beam search, which prints its text at the end.")
    ] = None,
    seed: SeedOption = None,
    prefill_chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Read the prompt in pieces of this many tokens.")
    ] = None,
) -> None:
    """Continue PROMPT and print the text while it is generated.

    Sampling options imply --do-sample.
    """
    options = _generation_options(
        do_sample,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        num_beams=num_beams,
        prefill_chunk_size=prefill_chunk_size,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded, tokenizer = _load(model, dtype, device_map, attn_implementation, load_in_4bit)
    from transformers import TextStreamer, set_seed

    if seed is not None:
        set_seed(seed)
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(loaded.device)
    if inputs.input_ids.shape[1] == 0:
        raise typer.BadParameter("It has no tokens: write at least one word.", param_hint="PROMPT")
    streamer = None if (num_beams or 1) > 1 else TextStreamer(tokenizer, skip_special_tokens=True)
    output = loaded.generate(**inputs, **options, streamer=streamer)
    if streamer is None:
        typer.echo(tokenizer.decode(output[0], skip_special_tokens=True))


@app.command()
def chat(
    model: Annotated[str, typer.Option("--model", help="Folder or hub id of an instruct checkpoint.")],
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens in a reply.")] = 500,
    dtype: DtypeOption = Dtype.auto,
    device_map: DeviceMapOption = None,
    attn_implementation: AttentionOption = None,
    load_in_4bit: FourBitOption = False,
    do_sample: SampleOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
) -> None:
    """Chat in the terminal, or answer the lines of standard input.

    /reset starts again, /system TEXT starts again with another system prompt, /exit ends; Ctrl-C ends a reply.
    """
    options = _generation_options(do_sample, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    loaded, tokenizer = _load(model, dtype, device_map, attn_implementation, load_in_4bit)
    from transformers import TextStreamer, set_seed

    from .chat.session import ChatSession

    if seed is not None:
        set_seed(seed)
    interrupted = threading.Event()
    try:
        session = ChatSession(loaded, tokenizer, system, stopping_criteria=[_stop_if(interrupted)], **options)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    for line in _lines("> "):
        command, _, argument = line.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            session.reset(system)
        elif command == "/system":
            session.reset(system := argument.strip() or None)
        elif command.startswith("/"):
            typer.echo(f"There is no command {command}: use /reset, /system TEXT or /exit.", err=True)
        elif line:
            with _ctrl_c_sets(interrupted):
                session.reply(line, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))


def _stop_if(event: threading.Event) -> Callable[..., Any]:
    """A stopping criterion of ``generate`` that ends the text once the event is set."""
    import torch

    def criterion(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), event.is_set(), device=input_ids.device)

    return criterion


@contextmanager
def _ctrl_c_sets(event: threading.Event) -> Iterator[None]:
    """Within the block, Ctrl-C sets the event instead of raising an error."""
    event.clear()
    previous = signal.signal(signal.SIGINT, lambda number, frame: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _lines(prompt: str) -> Iterator[str]:
    """The lines that the user types, or those of a pipe."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            typer.echo(prompt, nl=False)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


# The rest of the command line belongs to another program, options included.
PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}
SERVER_PACKAGES = ("accelerate", "fastapi", "openai", "pydantic", "uvicorn")


@app.command(context_settings={**PASSED_ON, "help_option_names": []})
def serve(options: Annotated[list[str] | None, typer.Argument(help="Options of the server.")] = None) -> None:
    """Serve chats and texts over HTTP, on 127.0.0.1 unless --host is given.

    This is `transformers serve`, with all its options; `mistral-hf serve --help` lists them.
    """
    options = options or []
    missing = [package for package in SERVER_PACKAGES if find_spec(package) is None]
    if missing and "--help" not in options:
        remedy = "which is not installed: pip install 'mistral_hf[serve]' brings it."
        typer.echo(f"The server needs {' and '.join(missing)}, {remedy}", err=True)
        raise typer.Exit(1)
    from transformers.cli.serve import Serve

    server = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    server.command()(Serve)
    server(["--host", "127.0.0.1", *options], prog_name="mistral-hf serve")  # a second --host replaces the first


@app.command(context_settings=PASSED_ON)
def run(
    command: Annotated[list[str], typer.Argument(help="SCRIPT.py, -m MODULE or a program, and its arguments.")],
) -> None:
    """Run COMMAND with the package registered in it, and in every Python process that it starts.

    For programs that load models without importing mistral_hf: lm_eval, trl, accelerate launch, torchrun, axolotl.
    """
    from .launch import launch

    launch(command)


@app.command()
def convert(
    input_dir: Annotated[Path, typer.Argument(help="Folder with params.json and raw weights.")],
    output_dir: Annotated[Path, typer.Argument(help="Folder to write; it appears when complete.")],
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the output; auto keeps every bit.")] = Dtype.auto,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest output file of a model.", show_default="5GB")
    ] = None,
    max_position_embeddings: Annotated[int | None, typer.Option(min=1, help="If the input does not give it.")] = None,
    rope_theta: Annotated[float | None, typer.Option(min=1, help="If the input does not give it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Convert raw Mistral weights, or a raw LoRA adapter, to Hugging Face format."""
    from .convert.console import byte_progress, exit_on_error
    from .convert.folders import convert_raw_to_hf

    with exit_on_error(), byte_progress() as progress:
        result = convert_raw_to_hf(
            input_dir,
            output_dir,
            dtype=None if dtype is Dtype.auto else dtype.value,
            max_shard_size=max_shard_size,
            max_position_embeddings=max_position_embeddings,
            rope_theta=rope_theta,
            overwrite=overwrite,
            progress=progress,
        )
    typer.echo(result.summary())


def _generation_options(do_sample: bool | None, **options: Any) -> dict[str, Any]:
    """Keywords of ``generate``: the options that were given, and ``do_sample`` where they imply it."""
    given = {name: value for name, value in options.items() if value is not None}
    sampling = [f"--{name.replace('_', '-')}" for name in SAMPLING if name in given]
    if do_sample is False and sampling:
        raise typer.BadParameter(f"It contradicts {', '.join(sampling)}: leave one out.", param_hint="--greedy")
    if do_sample is not None or sampling:
        given["do_sample"] = do_sample is not False
    return given


def _load(
    name: str, dtype: Dtype, device_map: str | None, attn_implementation: str | None, load_in_4bit: bool
) -> tuple[Any, Any]:
    """The model, in evaluation mode, and the tokenizer of a checkpoint.

    Raises:
        typer.BadParameter: A package is missing, or the checkpoint cannot be loaded.
    """
    _check_folder(name)
    if device_map is not None:
        _check_installed("--device-map", "accelerate")
    if load_in_4bit:
        _check_installed("--load-in-4bit", "bitsandbytes", "accelerate")
    else:  # the library imports it in any case, and it warns that its 4-bit kernels could be faster
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from .modeling_mistral import MistralForCausalLM

    quantization = {}  # an argument of None would make the library ignore how a quantized checkpoint was saved
    if load_in_4bit:
        compute_dtype = torch.bfloat16 if dtype is Dtype.auto else getattr(torch, dtype.value)
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype.value,
            device_map=device_map,
            attn_implementation=attn_implementation,
            **quantization,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise typer.BadParameter(f"{name} cannot be loaded: {error}", param_hint="--model") from error
    if not isinstance(model, MistralForCausalLM):
        typer.echo(f"Note: {name} is not a Mistral; {type(model).__name__} of the library runs it.", err=True)
    if device_map is None and not load_in_4bit and torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model.eval(), tokenizer


def _check_folder(name: str) -> None:
    """Check that a folder is complete; other names are ids on the hub, in the form ``name`` or ``owner/name``."""
    folder = Path(name)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise typer.BadParameter(
                f"{folder} has no config.json: give the folder that holds it and the weights.", param_hint="--model"
            )
    elif name.startswith(".") or folder.is_absolute() or len(folder.parts) > 2:
        raise typer.BadParameter(f"There is no folder {folder}: give a folder or a hub id.", param_hint="--model")


def _check_installed(option: str, *packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise typer.BadParameter(
            f"It needs {' and '.join(missing)}, which is not installed: pip install 'mistral_hf[bnb]' brings it.",
            param_hint=option,
        )


@app.command()
def info() -> None:
    """Show versions, the classes of the Auto classes, attention back ends, devices and memory."""
    from .registration import resolved, resolved_names

    _print_table("Versions", [("python", platform.python_version()), *((name, _version(name)) for name in PACKAGES)])
    found_classes = (resolved() | resolved_names()).items()
    classes = ((name, f"{found.__module__}.{found.__qualname__}") for name, (found, _) in found_classes)
    _print_table('Classes for model_type "mistral"', classes)
    _print_table("Attention back ends", ((name, _backend_state(name)) for name in BACKENDS))
    _print_table("Devices", _devices())
    state = str(BUNDLED_CHECKPOINT) if BUNDLED_CHECKPOINT.is_dir() else f"missing: {BUNDLED_CHECKPOINT}"
    _print_table("Bundled checkpoint", [("tiny-mistral", state)])


def _print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    rows = list(rows)
    width = max([38, *(len(name) + 2 for name, _ in rows)])
    typer.echo(title)
    for name, value in rows:
        typer.echo(f"  {name:<{width}}{value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _backend_state(name: str) -> str:
    """Whether an attention back end works here, found by running a model of one layer with it."""
    import torch
    from transformers import AutoModelForCausalLM

    from .configuration_mistral import MistralConfig
    from .torch.flash_kernels import NAME, find_kernels

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name == "flex_attention" and device.type == "cpu":  # it would have to be compiled, which takes long
        compiler = os.environ.get("CXX", "g++")
        return (
            "usable"
            if shutil.which(compiler)
            else f"not usable: it needs a compiler, and there is no compiler {compiler}"
        )
    config = MistralConfig(
        vocab_size=8,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    try:
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.bfloat16)
        model.to(device).eval()
        with torch.inference_mode():
            model(torch.zeros(1, 2, dtype=torch.long, device=device))
    except (ImportError, ValueError, RuntimeError) as error:
        return f"not usable: {error}"
    return f"usable: {find_kernels().name}" if name == NAME else "usable"


def _devices() -> Iterable[tuple[str, str]]:
    import torch

    names = getattr(os, "sysconf_names", {})
    pages = [os.sysconf(name) if name in names else 0 for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")]
    memory = _memory(*(count * os.sysconf("SC_PAGE_SIZE") for count in pages)) if all(pages) else "unknown memory"
    yield "cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {memory}"
    for index in range(torch.accelerator.device_count()):
        yield f"{torch.accelerator.current_accelerator()}:{index}", _memory(*torch.accelerator.get_memory_info(index))


def _memory(free: int, total: int) -> str:
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
