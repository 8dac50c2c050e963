"""Commands with options, values, folders and bytes of standard input drawn at random end as commands should."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging as library_logging
from typer.testing import CliRunner

from mistral_hf import BUNDLED_CHECKPOINT
from mistral_hf.cli import app
from mistral_hf.cli.application import TRACEBACK
from tests.helpers.raw_reference import COMMON, raw_tensors, write_raw, write_raw_lora

NUMBERS = [
    "0",
    "1",
    "2",
    "0.5",
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e-320",
    "4294967296",
    "9" * 30,
    "x",
    "",
    "½",
    "0x10",
]
WORDS = [
    "",
    "x",
    "auto",
    "cpu",
    "cuda",
    "cuda:1",
    "cuda:x",
    "meta",
    "mps",
    "disk",
    "-1",
    "é",
    "\udcff",
    "a/b",
    "0",
    "\n",
]
BACKENDS = ["eager", "sdpa", "flash_attention_2", "flash_attention_9", "paged|sdpa", "", "é", "None"]
DTYPES = ["auto", "float32", "bfloat16", "float16", "float8", "", "FLOAT32"]
OPTIONS: dict[str, list[str]] = {
    **dict.fromkeys(("--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed"), NUMBERS),
    **dict.fromkeys(("--prefill-chunk-size", "--max-new-tokens"), NUMBERS),
    "--num-beams": ["1", "3", "0", "100000", "nan"],
    "--dtype": DTYPES,
    "--device-map": WORDS,
    "--attn-implementation": BACKENDS,
    "--revision": WORDS,
    "--system": [*WORDS, "Be brief.", "refuse"],
    "--load": ["", "nowhere", __file__, ".", "\n"],
    "--save": ["", ".", "no/folder", "/proc/x"],
}
FLAGS = [
    "--do-sample",
    "--greedy",
    "--json",
    "--stats",
    "--quiet",
    "--markdown",
    "--no-markdown",
    "--nothing",
    "--help",
]
LINES = [
    b"Hello",
    b"/help",
    b"/reset",
    b"/system",
    b"/system refuse",
    b"/retry",
    b"//x",
    b"/save",
    b"/load nowhere",
    b"/x",
]
CONVERSIONS: dict[str, list[str]] = {
    "--dtype": DTYPES,
    "--max-shard-size": ["5GB", "1KB", "0", "-1", "x", "9" * 30 + "GB", ""],
    "--max-position-embeddings": NUMBERS,
    "--rope_theta": NUMBERS,
    "--tokenizer_version": WORDS,
    "--to": ["hf", "raw", "x", ""],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, chat_folder: Path) -> dict[str, Path]:
    """Folders of every kind that a person may name."""
    root = tmp_path_factory.mktemp("fuzz")
    found = {"bundled": BUNDLED_CHECKPOINT, "chat": chat_folder, "nowhere": root / "nowhere", "file": Path(__file__)}
    found["raw"] = write_raw(root / "raw", COMMON, raw_tensors(COMMON))
    write_raw_lora(root / "lora")
    (root / "gguf").mkdir()
    (root / "empty").mkdir()
    (root / "gguf/model.gguf").write_bytes(b"GGUF")
    found |= {
        "lora": root / "lora",
        "gguf": root / "gguf",
        "empty": Path(shutil.copytree(root / "gguf", root / "empty" / "folder").parent),
    }
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(chat_folder), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(root / "adapter")
    found["adapter"] = root / "adapter"
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        found[f"cut {name}"] = Path(shutil.copytree(chat_folder, root / f"cut {name}"))
        content = (chat_folder / name).read_bytes()
        (root / f"cut {name}" / name).write_bytes(content[: len(content) // 2])
    found["config"] = Path(shutil.copytree(chat_folder, root / "config"))
    return found


@pytest.fixture(autouse=True)
def library_as_before() -> Iterator[None]:
    """``--quiet`` lowers the library's verbosity for good, which is right in a command only."""
    verbosity = library_logging.get_verbosity(), logging.getLogger("bitsandbytes").level
    yield
    library_logging.set_verbosity(verbosity[0])
    logging.getLogger("bitsandbytes").setLevel(verbosity[1])


def options_of(table: dict[str, list[str]]) -> st.SearchStrategy[list[str]]:
    """At most two options with values from the table, now and then any text."""
    valued = st.sampled_from(sorted(table)).flatmap(
        lambda name: st.tuples(
            st.just(name), st.sampled_from(table[name]) | st.text(max_size=5).filter(lambda t: "\0" not in t)
        )
    )
    return st.lists(valued, max_size=2).map(lambda pairs: [word for pair in pairs for word in pair])


FIELDS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(sorted(json.loads((BUNDLED_CHECKPOINT / "config.json").read_text()))),
        "value": st.sampled_from([None, 0, -1, 1.5, "x", [], {}, True, 10**30]),
    }
)

USUAL = {"generate": "chat", "chat": "chat", "convert": "raw", "verify": "raw"}  # the folder that a command is for
KINDS = ["chat", "bundled", "adapter", "raw", "lora", "gguf", "empty", "nowhere", "file", "config"]
KINDS += ["cut config.json", "cut model.safetensors", "cut tokenizer.json"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[str], str, dict[str, Any], bytes]:
    """A command, its options, the kind of its folder, a changed field of the configuration, and standard input."""
    command = draw(st.sampled_from(sorted(USUAL)))
    kind = draw(st.just(USUAL[command]) | st.sampled_from(KINDS))
    lines = st.lists(st.sampled_from(LINES) | st.binary(max_size=6), max_size=3).map(b"\n".join)
    table = OPTIONS if command in ("generate", "chat") else CONVERSIONS
    flags = draw(st.lists(st.sampled_from(FLAGS), max_size=1))
    return command, [*draw(options_of(table)), *flags], kind, draw(FIELDS), draw(lines)


def check(folders: dict[str, Path], tmp_path: Path, case: tuple[str, list[str], str, dict[str, Any], bytes]) -> int:
    command, options, kind, field, stdin = case
    folder = str(folders[kind])
    if kind == "config":
        config = json.loads((BUNDLED_CHECKPOINT / "config.json").read_text())
        (folders[kind] / "config.json").write_text(json.dumps({**config, field["name"]: field["value"]}))
    words = {
        "generate": ["-", "--model", folder],
        "chat": ["--model", folder],
        "convert": [folder, str(tmp_path / "output")],
        "verify": [folder, str(folders["raw"]), "--no-logits"],
    }[command]
    few = ["--max-new-tokens", "2"] if command in ("generate", "chat") and "--max-new-tokens" not in options else []
    result = CliRunner().invoke(app, [command, *words, *options, *few], input=stdin)
    shutil.rmtree(tmp_path / "output", ignore_errors=True)
    event(f"{command} ended with {result.exit_code}")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in ({0, 1, 2} if command == "verify" else {0, 2, 130}), result.output
    assert "Traceback" not in result.output
    assert TRACEBACK not in result.output  # an error that nobody foresaw
    if result.exit_code == 2 and command != "chat":
        assert result.stderr.splitlines()[-1].startswith("Error: ")
    return result.exit_code


CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@given(case=cases())
@settings(max_examples=60, deadline=None, suppress_health_check=CHECKS)
def test_every_command_line_ends_with_a_code_and_without_a_traceback(
    folders: dict[str, Path], tmp_path: Path, case: Any
) -> None:
    check(folders, tmp_path, case)


@pytest.mark.slow
@given(case=cases())
@settings(max_examples=3000, deadline=None, suppress_health_check=CHECKS)
def test_many_command_lines_end_with_a_code_and_without_a_traceback(
    folders: dict[str, Path], tmp_path: Path, case: Any
) -> None:
    check(folders, tmp_path, case)
