"""Compiled and exported models compute the same, and decoding from the static rolling buffer needs one graph."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, DataCollatorWithFlattening

from mistral_hf import RollingCache
from tests.helpers.comparison import TIGHT, assert_same_outputs, labels_of
from tests.helpers.family import FAMILY

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

COLLATORS: dict[str, dict[str, bool]] = {
    "positions": {},
    "bounds": {"return_flash_attn_kwargs": True},
    "bounds alone": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "numbers alone": {"return_seq_idx": True, "return_position_ids": False},
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@FAMILY
def test_a_compiled_language_model_matches_the_model(backend: str, make_model: Any, padded: Any) -> None:
    model = make_model(num_hidden_layers=1)
    inputs = padded(12, 5)
    inputs |= labels_of("ForCausalLM", inputs)
    expected = model(**inputs, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend=backend)(**inputs, use_cache=False)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(compiled.logits[real], expected.logits[real], **TIGHT)
    torch.testing.assert_close(compiled.loss, expected.loss, **TIGHT)


@pytest.mark.parametrize("collator", COLLATORS)
def test_a_training_step_of_packed_rows_compiles_to_one_graph(collator: str, make_model: Any, sequences: Any) -> None:
    model = make_model(num_hidden_layers=1).train()
    inputs = DataCollatorWithFlattening(**COLLATORS[collator])([dict(row) for row in sequences])
    gradients = []
    for run in (torch.compile(model, fullgraph=True, backend="eager"), model):
        model.zero_grad()
        run(**inputs, use_cache=False).loss.backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    torch.testing.assert_close(*gradients, **TIGHT)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_compiled_heads_match_the_model(head: str, make_model: Any, padded: Any) -> None:
    inputs = padded(12, 5)
    inputs |= labels_of(head, inputs)
    model = make_model(head, num_hidden_layers=1)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")(**inputs, use_cache=False)
    assert_same_outputs(compiled, model(**inputs, use_cache=False), real=inputs["attention_mask"])


@pytest.mark.parametrize("length", [12, 600])
def test_an_exported_program_matches_the_model(length: int, make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(num_hidden_layers=1), token_ids(2, length)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    exported = torch.export.export(model, (), inputs, strict=False).module()
    torch.testing.assert_close(exported(**inputs).logits[:, 3:], model(**inputs).logits[:, 3:], **TIGHT)


@pytest.mark.parametrize("with_mask", [False, True])
@FAMILY
def test_one_exported_program_serves_every_length(with_mask: bool, make_model: Any, token_ids: Any) -> None:
    """The lengths lie below and above the window, and beyond a block of queries."""
    model = make_model(num_hidden_layers=1)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=2000)}

    def inputs(batch: int, length: int) -> dict[str, Any]:
        ids = token_ids(batch, length)
        return {"input_ids": ids, "use_cache": False} | ({"attention_mask": torch.ones_like(ids)} if with_mask else {})

    shapes = {name: None if name == "use_cache" else sizes for name in inputs(2, 12)}
    exported = torch.export.export(model, (), inputs(2, 12), dynamic_shapes=shapes, strict=False).module()
    for batch, length in ((3, 30), (2, 5), (1, 600)):
        torch.testing.assert_close(
            exported(**inputs(batch, length)).logits, model(**inputs(batch, length)).logits, **TIGHT
        )


@FAMILY
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


@FAMILY
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
        arguments: dict[str, Any] = {
            "attention_mask": mask,
            "max_new_tokens": 30,
            "do_sample": False,
            "eos_token_id": None,
        }
        expected = model.generate(ids, **arguments)
        compiled = model.generate(ids, cache_implementation="static", compile_config=config, **arguments)
        assert torch.equal(compiled, expected)
    assert counter.frame_count == 1


def compile_with(counter: CompileCounter, original: Any) -> Any:
    """`torch.compile` with a counting backend in place of the requested one."""

    def compile_counted(function: Any = None, **kwargs: Any) -> Any:
        return original(function, **{**kwargs, "backend": counter, "mode": None})

    return compile_counted
