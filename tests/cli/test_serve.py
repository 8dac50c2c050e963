"""`mistral-hf serve` answers with the text of `generate`, alone or in a batch. All traffic stays on 127.0.0.1."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mistral_hf.bundled import BUNDLED_CHECKPOINT
from mistral_hf.cli import app, programs

openai: Any = pytest.importorskip("openai")
for package in programs.SERVER_PACKAGES:
    pytest.importorskip(package)

CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
SENTENCES = (
    *("The captain looked out over the sea.", "It was a dark night.", "His wife had gone to London.", "A king came."),
    *("The old door stood open.", "She took the letter.", "Two days later it rained.", "Nobody answered the bell."),
)
PROMPTS = [" ".join((SENTENCES[first:] + SENTENCES[:first]) * 4) for first in range(len(SENTENCES))]
NEW_TOKENS = 24

# The command itself; it also prints the class of every model that the server loads.
SERVE = """
import sys
from mistral_hf.cli import app
from transformers.cli.serving.model_manager import ModelManager

def load(*arguments, load_model=ModelManager._load_model, **options):
    model = load_model(*arguments, **options)
    print("loaded", type(model).__module__, type(model).__qualname__, file=sys.stderr, flush=True)
    return model

ModelManager._load_model = load
app(["serve", *sys.argv[1:]])
"""


class Server(NamedTuple):
    """A server that runs: a client of it, the name of its model, its log, and whether it batches continuously."""

    client: Any
    model: str
    log: Path
    batched: bool

    def complete(self, prompt: str) -> str:
        answer = self.client.completions.create(model=self.model, prompt=prompt, max_tokens=NEW_TOKENS, temperature=0)
        return answer.choices[0].text

    def stream(self, prompt: str, max_tokens: int = NEW_TOKENS) -> Any:
        return self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint with a chat template."""
    copy = shutil.copytree(BUNDLED_CHECKPOINT, tmp_path_factory.mktemp("served") / "checkpoint")
    (copy / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return copy


@pytest.fixture(scope="module", params=["one by one", "continuous batching"])
def server(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--dtype", "float32", "--device", "cpu"]
    batched = request.param == "continuous batching"
    if batched:
        options += ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "256"]
    log = tmp_path_factory.mktemp("log") / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(folder), *options],
            stdout=stderr,
            stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        deadline = time.monotonic() + 90
        while "Uvicorn running" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        http = openai.DefaultHttpxClient(trust_env=False)  # no proxy
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=0, http_client=http
        ) as client:
            yield Server(client, str(folder), log, batched)
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def greedy(loaded: tuple[Any, Any], inputs: Any) -> str:
    model, tokenizer = loaded
    output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def expected(loaded: tuple[Any, Any]) -> list[str]:
    """The text that `generate` adds to every prompt alone; all prompts are longer than the window."""
    inputs = [loaded[1](prompt, return_tensors="pt") for prompt in PROMPTS]
    assert all(one.input_ids.shape[1] > loaded[0].config.sliding_window for one in inputs)
    texts = [greedy(loaded, one) for one in inputs]
    assert len(set(texts)) > len(texts) / 2  # so that exchanged answers show
    return texts


def test_our_model_serves_on_the_loopback_address(server: Server) -> None:
    log = server.log.read_text()
    assert re.findall("^loaded (.*)", log, re.MULTILINE) == ["mistral_hf.modeling_mistral MistralForCausalLM"]
    assert re.findall(r"running on http://([\w.]+):", log) == ["127.0.0.1"]


def test_a_completion_matches_generate(server: Server, expected: list[str]) -> None:
    assert server.complete(PROMPTS[0]) == expected[0]


def test_a_streamed_completion_matches_generate(server: Server, expected: list[str]) -> None:
    with server.stream(PROMPTS[1]) as stream:
        pieces = [chunk.choices[0].text for chunk in stream]
    assert len(pieces) > 2
    assert "".join(pieces) == expected[1]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_chat_matches_generate(server: Server, loaded: tuple[Any, Any], streamed: bool) -> None:
    messages = [{"role": "user", "content": "What did the captain see?"}]
    inputs = loaded[1].apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    options: Any = {"model": server.model, "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
    answer: Any = server.client.chat.completions.create(**options, stream=streamed)
    if streamed:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    assert text == greedy(loaded, inputs)


def test_concurrent_requests_past_the_window_match_generate(server: Server, expected: list[str]) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(server.complete, PROMPTS)) == expected
    batched = set(re.findall("CB: (True|False)", server.log.read_text()))
    assert batched == {str(server.batched)}


def test_a_cancelled_request_leaves_the_server_well(server: Server, expected: list[str]) -> None:
    with server.stream(PROMPTS[2], max_tokens=100_000) as stream:
        for _, _ in zip(range(3), stream, strict=False):
            pass
    assert server.complete(PROMPTS[3]) == expected[3]  # within the client's time, so the other one has ended
    health = str(server.client.base_url.join("/health"))
    assert server.client.get(health, cast_to=dict) == {"status": "ok"}


def received(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """What the library's command receives from `mistral-hf serve`."""
    values: dict[str, Any] = {}

    def serve(model: str, host: str = "0.0.0.0", port: int = 8000, compile: bool = False) -> None:
        values.update(model=model, host=host, port=port, compile=compile)

    monkeypatch.setattr("transformers.cli.serve.Serve", serve)
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 0, result.output
    return values


def test_only_host_opens_the_server_to_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert received(monkeypatch, "folder")["host"] == "127.0.0.1"
    assert received(monkeypatch, "folder", "--host", "0.0.0.0")["host"] == "0.0.0.0"
    assert received(monkeypatch, "--host=::", "folder")["host"] == "::"


def test_options_reach_the_library_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--compile", "folder", "--port", "1"], ["folder", "--port=1", "--compile"]):
        wanted = {"model": "folder", "host": "127.0.0.1", "port": 1, "compile": True}
        assert received(monkeypatch, *arguments) == wanted


def test_the_help_is_that_of_the_library() -> None:
    result = CliRunner().invoke(app, ["serve", "--help"])
    assert result.exit_code == 0
    assert "Usage: mistral-hf serve" in result.stdout
    assert "--continuous-batching" in result.stdout


@pytest.mark.parametrize("missing", programs.SERVER_PACKAGES)
def test_a_missing_package_is_one_line_with_its_remedy(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(programs, "find_spec", lambda name: None if name == missing else object())
    result = CliRunner().invoke(app, ["serve", "folder"])
    assert (result.exit_code, result.stdout) == (2, "")
    remedy = f"Error: The server needs {missing}, which is not installed: pip install 'mistral_hf[serve]' brings it.\n"
    assert result.stderr == remedy
