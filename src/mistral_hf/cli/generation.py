"""``mistral-hf generate``."""

import json
from time import perf_counter
from typing import Annotated

import typer

from ..bundled import BUNDLED_CHECKPOINT
from .application import app, interruptible, read_stdin, utf8
from .loading import load
from .options import GenerationOptions, JsonOption, LoadOptions, StatsOption, count, value


@app.command()
def generate(
    loading: LoadOptions,
    generation: GenerationOptions,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from standard input.")],
    model: Annotated[
        str,
        value("MODEL", "Folder or hub id of a checkpoint.", default="the bundled checkpoint"),
    ] = str(BUNDLED_CHECKPOINT),
    max_new_tokens: Annotated[int, count("Largest number of tokens to add.")] = 100,
    num_beams: Annotated[int | None, count("Beams of a beam search, which prints its text at the end.", 1000)] = None,
    as_json: JsonOption = False,
    stats: StatsOption = False,
) -> None:
    """Continue PROMPT and print the text while it is generated.

    Sampling options imply --do-sample.
    """
    keywords = generation.keywords(max_new_tokens=max_new_tokens, num_beams=num_beams)
    text = read_stdin("PROMPT") if prompt == "-" else utf8(prompt, "PROMPT")
    loaded, tokenizer = load(model, loading)
    from transformers import set_seed

    from .streaming import TimedStreamer, statistics, summary

    if generation.seed is not None:
        set_seed(generation.seed)
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(loaded.device)
    read = inputs.input_ids.shape[1]
    if read == 0:
        raise typer.BadParameter("It has no tokens: write at least one word.", param_hint="PROMPT")
    streamer = None if (num_beams or 1) > 1 else TimedStreamer(tokenizer, silent=as_json)
    start = perf_counter()
    with interruptible():
        output = loaded.generate(**inputs, **keywords, streamer=streamer)
    times = [start, *(streamer.times[1:] if streamer is not None else []), perf_counter()]
    numbers = statistics(times, read, output.shape[1] - read)
    whole, beginning = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (output[0], output[0, :read]))
    if as_json:
        record = {"prompt": text, "text": whole.removeprefix(beginning), **numbers}
        typer.echo(json.dumps(record, ensure_ascii=False))
    elif streamer is None:
        typer.echo(whole)
    if stats:
        typer.echo(summary(numbers), err=True)
