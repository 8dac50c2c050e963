"""`generate` writes the text of the reference, with every decoding strategy and every cache."""

import importlib.util
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
    cache_utils,
    pipeline,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.mistral.modeling_mistral import MistralForCausalLM as StockForCausalLM

from mistral_hf import MistralForCausalLM, RollingCache
from tests.helpers import reference
from tests.helpers.family import FAMILY, WINDOWED

FREE: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
WINDOWS = pytest.mark.parametrize("window", [None, 1, 2, 8])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def generate(model: Any, inputs: dict[str, Tensor], count: int = 20, **options: Any) -> Any:
    """Exactly `count` greedy tokens, unless `options` choose another strategy."""
    return model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, **{**FREE, **options})


@pytest.mark.parametrize(("window", "implementation"), [(None, "sdpa"), (8, "sdpa"), (8, "eager"), (40, "sdpa")])
@FAMILY
def test_greedy_text_matches_the_reference_over_256_tokens(
    window: int | None, implementation: str, make_pair: Any, padded: Any
) -> None:
    """The window turns over many times, and the rows are padded differently."""
    pair = make_pair("ForCausalLM", implementation, sliding_window=window, num_hidden_layers=1)
    inputs = padded(21, 1, 9, 13)
    ours, stock = (generate(model, inputs, 256) for model in pair)
    assert ours.shape == (4, 21 + 256)
    assert torch.equal(ours, stock)
    assert len(ours[:, 21:].unique()) > 20, "a text of few words proves little"


@IMPLEMENTATIONS
@WINDOWS
@WINDOWED
def test_greedy_matches_the_uncached_oracle(
    window: int | None, implementation: str, make_model: Any, padded: Any
) -> None:
    """Also for window 1, where the library's sliding layer keeps every key."""
    model = make_model("ForCausalLM", implementation, sliding_window=window)
    inputs = padded(11, 4)
    expected = reference.greedy(model.state_dict(), model.config, inputs["input_ids"], 20, inputs["attention_mask"])
    assert torch.equal(generate(model, inputs, 20), expected)
    assert torch.equal(generate(model, inputs, 20, use_cache=False), expected)


@FAMILY
def test_padding_does_not_change_the_text(make_model: Any, padded: Any) -> None:
    model = make_model()
    inputs = padded(21, 1, 9)
    together = generate(model, inputs)
    for row, length in enumerate((21, 1, 9)):
        ids = inputs["input_ids"][row : row + 1, 21 - length :]
        alone = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert torch.equal(together[row, 21:], alone[0, length:])


@FAMILY
def test_prompts_longer_than_a_block_of_queries_match_the_reference(make_pair: Any, padded: Any) -> None:
    ours, stock = (generate(model, padded(700, 650)) for model in make_pair(sliding_window=100))
    assert torch.equal(ours, stock)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 2, "do_sample": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=lambda options: "-".join(options),
)
@FAMILY
def test_every_decoding_strategy_matches_the_reference(options: dict[str, Any], make_pair: Any, padded: Any) -> None:
    texts = []
    for model in make_pair():
        torch.manual_seed(5)
        texts.append(generate(model, padded(11, 4), **options))
    assert torch.equal(*texts)


class Oracle(MistralForCausalLM):
    """The library's `generate` on top of the oracle's logits, without a cache."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        logits = reference.logits(self.state_dict(), self.config, input_ids, attention_mask=attention_mask)
        return CausalLMOutputWithPast(logits=logits)


@WINDOWS
@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3}], ids=["sampling", "beams"])
@WINDOWED
def test_sampling_and_beams_match_the_oracle(
    options: dict[str, Any], window: int | None, make_model: Any, padded: Any
) -> None:
    model, inputs = make_model(sliding_window=window), padded(11, 4)
    oracle = Oracle(model.config).eval()
    oracle.load_state_dict(model.state_dict())
    texts = []
    for version, use_cache in ((model, True), (oracle, False)):
        torch.manual_seed(5)
        texts.append(generate(version, inputs, 24, use_cache=use_cache, **options))
    assert torch.equal(*texts)


@WINDOWS
@pytest.mark.parametrize("way", ["assisted", "lookup"])
@WINDOWED
def test_speculation_matches_the_oracle(way: str, window: int | None, make_model: Any, token_ids: Any) -> None:
    """Wrong guesses of an assistant or a lookup are removed from the buffer, before and after it wraps."""
    model, ids = make_model(sliding_window=window), token_ids(1, 4).repeat(1, 3)
    helper = make_model(sliding_window=window, num_hidden_layers=1)
    options = {"assisted": {"assistant_model": helper}, "lookup": {"prompt_lookup_num_tokens": 3}}[way]
    text = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 24, **options)
    assert torch.equal(text, reference.greedy(model.state_dict(), model.config, ids, 24))


def test_assisted_sampling_matches_the_reference(make_pair: Any, token_ids: Any) -> None:
    pair, helpers = make_pair(), make_pair(num_hidden_layers=1)
    inputs = {"input_ids": token_ids(1, 11), "attention_mask": torch.ones(1, 11, dtype=torch.long)}
    texts = []
    for model, helper in zip(pair, helpers, strict=True):
        torch.manual_seed(5)
        texts.append(generate(model, inputs, 24, do_sample=True, assistant_model=helper))
    assert torch.equal(*texts)


def test_end_of_text_stops_a_row(make_pair: Any, padded: Any) -> None:
    """The tenth token of row 0 becomes the end token: rows end at different steps and are padded."""
    pair, inputs = make_pair(), padded(11, 4, 7)
    free = generate(pair.ours, inputs)[:, 11:]
    end = free[0, 9].item()
    ours, stock = (m.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=end) for m in pair)
    assert torch.equal(ours, stock)
    assert (ours[0, 11:] == end).nonzero()[0] <= 9


@pytest.mark.parametrize("window", [None, 8])
@FAMILY
def test_assisted_decoding_does_not_change_the_text(window: int | None, make_pair: Any, token_ids: Any) -> None:
    """One assistant guesses well (it is the model itself), and another is mostly wrong."""
    pair = make_pair(sliding_window=window)
    wrong = make_pair(sliding_window=window, num_hidden_layers=1)
    inputs = {"input_ids": token_ids(1, 11), "attention_mask": torch.ones(1, 11, dtype=torch.long)}
    expected = generate(pair.ours, inputs, 24)
    for assistant in (pair.ours, wrong.ours, wrong.stock):
        assert torch.equal(generate(pair.ours, inputs, 24, assistant_model=assistant), expected)


@pytest.mark.parametrize("window", [None, 8])
def test_prompt_lookup_does_not_change_the_text(window: int | None, make_model: Any, token_ids: Any) -> None:
    model = make_model(sliding_window=window)
    ids = token_ids(1, 4).repeat(1, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = generate(model, inputs, 24)
    assert torch.equal(generate(model, inputs, 24, prompt_lookup_num_tokens=3), expected)


def test_our_model_can_assist_the_reference(make_pair: Any, token_ids: Any) -> None:
    pair = make_pair()
    inputs = {"input_ids": token_ids(1, 11), "attention_mask": torch.ones(1, 11, dtype=torch.long)}
    text = generate(pair.stock, inputs, 24, assistant_model=pair.ours)
    assert torch.equal(text, generate(pair.ours, inputs, 24))


@pytest.mark.parametrize("window", [None, 8])
def test_embeddings_generate_the_text_of_their_ids(window: int | None, make_pair: Any, padded: Any) -> None:
    pair, inputs = make_pair(sliding_window=window), padded(11, 4)
    expected = generate(pair.ours, inputs)[:, 11:]
    embeds = pair.ours.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(
        generate(pair.ours, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}), expected
    )


@pytest.mark.parametrize(
    ("cache", "window", "implementation"),
    [("dynamic", 8, "sdpa"), *(("static", window, "sdpa") for window in (None, 1, 2, 8)), ("static", 8, "eager")],
)
@WINDOWED
def test_named_cache_implementations_match_the_oracle(
    cache: str, window: int | None, implementation: str, make_model: Any, padded: Any
) -> None:
    model = make_model("ForCausalLM", implementation, sliding_window=window, num_hidden_layers=1)
    inputs = padded(11, 4)
    expected = reference.greedy(model.state_dict(), model.config, inputs["input_ids"], 20, inputs["attention_mask"])
    assert torch.equal(generate(model, inputs, cache_implementation=cache), expected)


@pytest.mark.parametrize("window", [None, 8])
@FAMILY
def test_beams_in_a_static_cache_match_the_default_cache(window: int | None, make_model: Any, padded: Any) -> None:
    model, inputs = make_model(sliding_window=window), padded(11, 4)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate(model, inputs, **beams)
    assert torch.equal(generate(model, inputs, cache_implementation="static", **beams), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading moves layers from and to an accelerator")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@FAMILY
def test_offloaded_caches_do_not_change_the_text(cache: str, make_model: Any, padded: Any) -> None:
    model = make_model().to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in padded(11, 4).items()}
    assert torch.equal(generate(model, inputs, cache_implementation=cache), generate(model, inputs, use_cache=False))


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("kind", ["dynamic", "dynamic without configuration", "static", "rolling", "static rolling"])
@WINDOWED
def test_a_cache_passed_by_the_caller_is_used_and_matches_the_oracle(
    kind: str, window: int | None, make_model: Any, padded: Any
) -> None:
    model = make_model(sliding_window=window)
    inputs = padded(11, 4)
    cache = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "dynamic without configuration": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=64),
        "rolling": lambda: RollingCache(model.config),
        "static rolling": lambda: RollingCache(model.config, max_cache_len=64),
    }[kind]()
    expected = reference.greedy(model.state_dict(), model.config, inputs["input_ids"], 20, inputs["attention_mask"])
    output = generate(model, inputs, 20, past_key_values=cache, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert output.past_key_values is cache


@pytest.mark.parametrize("backend", ["fp8", "quanto", "hqq"])
def test_quantized_caches_match_the_reference(backend: str, make_pair: Any, padded: Any) -> None:
    module = {"quanto": "optimum", "hqq": "hqq", "fp8": "torch"}[backend]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    if backend == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this release of transformers has no such cache")
    pair, inputs = make_pair(sliding_window=None), padded(11, 4)
    by_name = {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
    ours, stock = (generate(model, inputs, **by_name) for model in pair)
    assert torch.equal(ours, stock)
    cache = QuantizedCache(backend, pair.ours.config)
    assert torch.equal(generate(pair.ours, inputs, past_key_values=cache), ours)


@pytest.mark.parametrize(("chunk", "window"), [(1, 8), (3, None), (3, 1), (3, 2), (3, 8), (8, 8), (50, 8)])
@WINDOWED
def test_prefill_in_chunks_does_not_change_the_text(
    chunk: int, window: int | None, make_model: Any, padded: Any
) -> None:
    model = make_model(sliding_window=window)
    inputs = padded(19, 12)
    expected = generate(model, inputs, 12, use_cache=False)
    assert torch.equal(generate(model, inputs, 12, prefill_chunk_size=chunk), expected)


@WINDOWS
@FAMILY
def test_a_conversation_continues_from_its_cache(window: int | None, make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(sliding_window=window), token_ids(2, 9)
    cache = None
    for turn in range(3):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        output = generate(model, inputs, 10, past_key_values=cache, return_dict_in_generate=True)
        assert torch.equal(output.sequences, generate(model, inputs, 10, use_cache=False))
        cache = output.past_key_values
        ids = torch.cat([output.sequences, token_ids(2, 5, seed=turn)], dim=1)
        assert isinstance(cache, RollingCache)


def test_a_cache_can_be_reset_for_another_text(make_model: Any, padded: Any) -> None:
    model, inputs = make_model(), padded(11, 4)
    expected = generate(model, inputs)
    cache = RollingCache(model.config)
    generate(model, padded(30, 20), past_key_values=cache)
    cache.reset()
    assert torch.equal(generate(model, inputs, past_key_values=cache), expected)


def test_logits_of_every_step_match_the_reference_and_scores_are_returned(make_pair: Any, padded: Any) -> None:
    options = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    ours, stock = (generate(model, padded(11, 4), 20, **options) for model in make_pair())
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits), rtol=1e-5, atol=2e-5)
    assert len(ours.scores) == 20


@FAMILY
def test_attentions_and_hidden_states_of_every_step_match_the_reference(make_pair: Any, padded: Any) -> None:
    """Without a window, since a wrapped buffer would return the weights in the order of its slots."""
    options = {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}
    pair = make_pair("ForCausalLM", "eager", sliding_window=None)
    ours, stock = (generate(model, padded(11, 4), 12, **options) for model in pair)
    for mine, theirs in zip(ours.attentions[1:], stock.attentions[1:], strict=True):
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours.hidden_states[1:], stock.hidden_states[1:], strict=True):
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@FAMILY
def test_low_precision_runs_past_the_window(dtype: torch.dtype, make_model: Any, padded: Any) -> None:
    text = generate(make_model().to(dtype), padded(11, 4), 20)
    assert text.shape == (2, 31)


def test_exceeding_max_position_embeddings_warns_once(
    make_model: Any, token_ids: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text still matches that of the oracle, which has no limit."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model, ids = make_model(max_position_embeddings=17), token_ids(1, 11)
    short = generate(model, {"input_ids": ids}, 6)
    assert "max_position_embeddings=17" not in caplog.text
    text = generate(model, {"input_ids": ids}, 24)
    assert caplog.text.count("max_position_embeddings=17") == 1
    assert torch.equal(text[:, :17], short)
    assert torch.equal(text, reference.greedy(model.state_dict(), model.config, ids, 24))


def test_a_cache_takes_the_memory_of_one_window(make_model: Any, token_ids: Any) -> None:
    model = make_model()
    cache = RollingCache(model.config)
    generate(model, {"input_ids": token_ids(1, 500)}, 20, past_key_values=cache)
    assert {layer.key_buffer.untyped_storage().nbytes() for layer in cache.layers} == {2 * 8 * 12 * 4}
    assert cache.get_seq_length() == 519


@pytest.mark.parametrize("make_model", ["ministral"], indirect=True)
def test_only_the_layers_of_full_attention_grow_with_the_text(make_model: Any, token_ids: Any) -> None:
    kinds = ["full_attention", *["sliding_attention"] * 3]
    model = make_model(num_hidden_layers=4, layer_types=kinds)
    sizes = []
    for length in (64, 256, 1024):
        cache = RollingCache(model.config)
        options = {"cache": cache, "prefill_chunk_size": 64, "max_new_tokens": 2, "do_sample": False}
        model.generate(token_ids(1, length), **options)
        sizes.append([layer.key_buffer.untyped_storage().nbytes() for layer in cache.layers])
    full, *sliding = zip(*sizes, strict=True)
    assert [set(layer) for layer in sliding] == [{2 * 8 * 12 * 4}] * 3
    assert [size // (2 * 12 * 4) for size in full] == [128, 512, 2048]  # 1, 4 and 16 times the text, and the next token


@FAMILY
def test_continuous_batching_matches_generate(make_model: Any) -> None:
    model = make_model()
    prompts = [[5, 6, 7, 8], [9] * 13, [3, 4]]
    config = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)
    memory = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)  # by default, most of the free memory
    outputs = model.generate_batch(prompts, config, continuous_batching_config=memory, progress_bar=False)
    written = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    for prompt in prompts:
        ids = torch.tensor([prompt])
        alone = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 20)
        assert written[tuple(prompt)] == alone[0, len(prompt) :].tolist()
    assert model.config._attn_implementation == "sdpa"


def test_loaded_models_generate_the_same_text(checkpoint: Any, make_model: Any, padded: Any) -> None:
    expected = generate(make_model(), padded(11, 4))
    for loaded in (MistralForCausalLM, StockForCausalLM):
        assert torch.equal(generate(loaded.from_pretrained(checkpoint), padded(11, 4)), expected)


def test_the_text_generation_pipeline_matches_the_reference(make_pair: Any, tokenizer: Any) -> None:
    pair = make_pair(vocab_size=len(tokenizer))
    texts = ["in the beginning", "the quick"]
    results = []
    for model in pair:
        write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        results.append(write(texts, max_new_tokens=12, do_sample=False, batch_size=2))
    assert results[0] == results[1]
    assert results[0][0][0]["generated_text"].startswith(texts[0])


def test_the_text_classification_pipeline_matches_the_reference(make_pair: Any, tokenizer: Any) -> None:
    pair = make_pair("ForSequenceClassification", vocab_size=len(tokenizer), num_labels=3)
    texts = ["in the beginning", "the quick brown fox jumps"]
    ours, stock = (
        pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(texts, batch_size=2, top_k=None)
        for model in pair
    )
    for mine, theirs in zip(ours, stock, strict=True):
        assert [entry["label"] for entry in mine] == [entry["label"] for entry in theirs]
        assert [entry["score"] for entry in mine] == pytest.approx([entry["score"] for entry in theirs], abs=1e-5)


def test_the_token_classification_pipeline_matches_the_reference(make_pair: Any, tokenizer: Any) -> None:
    pair = make_pair("ForTokenClassification", vocab_size=len(tokenizer), num_labels=3)
    ours, stock = (
        pipeline("token-classification", model=model, tokenizer=tokenizer, device="cpu")("the quick brown fox")
        for model in pair
    )
    assert [entry["entity"] for entry in ours] == [entry["entity"] for entry in stock]
    assert [entry["score"] for entry in ours] == pytest.approx([entry["score"] for entry in stock], abs=1e-5)
