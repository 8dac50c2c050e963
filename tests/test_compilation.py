"""Compiled decoding with the static rolling buffer: the number of graphs, and that they compute the same."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig

from mistral_hf import RollingCache


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_one_graph_serves_before_at_and_after_the_wrap(make_model: Any, token_ids: Any) -> None:
    """The steps begin in an almost empty buffer and wrap it twice, in two sequences of different lengths."""
    model = make_model(sliding_window=8)
    counter = CompileCounter()
    step = torch.compile(model.forward, backend=counter, fullgraph=True)
    for prompt_length in (3, 6):
        ids = token_ids(2, 30)
        cache = RollingCache(model.config, max_cache_len=64)
        dynamic = RollingCache(model.config)
        with torch.no_grad():
            model(ids[:, :prompt_length], past_key_values=cache)
            model(ids[:, :prompt_length], past_key_values=dynamic)
            for position in range(prompt_length, 30):
                token = ids[:, position : position + 1]
                mask = model.create_masks_for_generate(model.config, torch.empty(2, 1, 0), None, cache)
                position_ids = torch.full((2, 1), position)
                compiled = step(token, attention_mask=mask, position_ids=position_ids, past_key_values=cache)
                eager = model(token, past_key_values=dynamic)
                torch.testing.assert_close(compiled.logits, eager.logits, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_generate_compiles_its_step_once(make_model: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls of `generate` with different prompt lengths, both across the wrap, share one decoding graph."""
    model = make_model(sliding_window=8)
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", compile_with(counter, torch.compile))
    config = CompileConfig(fullgraph=True)
    config._compile_all_devices = True
    for length in (5, 11):
        ids, mask = token_ids(2, length), torch.ones(2, length, dtype=torch.long)
        mask[0, :2] = 0
        arguments = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
        expected = model.generate(ids, **arguments)
        compiled = model.generate(ids, cache_implementation="static", compile_config=config, **arguments)
        assert torch.equal(compiled, expected)
    assert counter.frame_count == 1


def compile_with(counter: CompileCounter, original: Any) -> Any:
    """`torch.compile` with a counting backend in place of the requested one."""

    def compile_counted(function: Any = None, **kwargs: Any) -> Any:
        return original(function, **{**kwargs, "backend": counter, "mode": None})

    return compile_counted
