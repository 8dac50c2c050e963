"""`generate` of the TensorFlow port gives the tokens of PyTorch's, compiled once for prompts of similar lengths."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import mistral_hf
from mistral_hf import BUNDLED_CHECKPOINT, MistralForCausalLM
from mistral_hf.generation_options import GenerationOptions
from tests.helpers.tf_models import arrays, tf, tf_generation, tf_logits, to_tf

LENGTH = {"max_new_tokens": 24}


@pytest.fixture
def eagerly() -> Iterator[None]:
    """No program is traced or compiled."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def check_same(model: Any, inputs: Any, ported: Any = None, **options: Any) -> Any:
    """Check that both models generate the same tokens, which are returned; no token ends them unless one is given."""
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": [], **options}
    expected = model.generate(**inputs, **{**options, "eos_token_id": options["eos_token_id"] or None}).numpy()
    found = (ported or to_tf(model)).generate(**arrays(inputs), **options)
    assert found.dtype == tf.int32
    np.testing.assert_array_equal(found, expected)
    return expected


@pytest.mark.parametrize("window", [1, 2, 5, None])
def test_greedy_tokens_match_pytorch(make_model: Any, padded: Any, window: int | None) -> None:
    """Compiled, left-padded, prompts longer than the window, which wraps more than twice."""
    model = make_model(sliding_window=window, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    check_same(model, padded(7, 16), max_new_tokens=32)  # fills the programs' buckets, and without a window the buffer


def test_128_greedy_tokens_of_a_trained_checkpoint_match_pytorch() -> None:
    model = MistralForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32).eval()
    ported = mistral_hf.TFMistralForCausalLM.from_pretrained(BUNDLED_CHECKPOINT)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)
    prompts = ["Once upon a time", (BUNDLED_CHECKPOINT / "heldout.txt").read_text()[2000:2900]]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    assert inputs["input_ids"].shape[1] > 128
    check_same(model, inputs, ported, max_new_tokens=128)


@pytest.mark.usefixtures("eagerly")
def test_a_prompt_in_chunks_gives_the_same_tokens(
    make_model: Any, padded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tf_generation, "CHUNK", 8)
    check_same(make_model(sliding_window=5), padded(30, 3), max_new_tokens=6)


@pytest.mark.usefixtures("eagerly")
def test_frequencies_that_depend_on_the_length_are_those_of_the_whole_prompt(
    make_model: Any, padded: Any, rope_parameters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processed in chunks, its first tokens would be turned as in a short sequence."""
    monkeypatch.setattr(tf_generation, "CHUNK", 8)
    fields = {"max_position_embeddings": 8, "rope_parameters": rope_parameters("dynamic"), "sliding_window": None}
    check_same(make_model(**fields), padded(30, 24), max_new_tokens=6)


def test_a_compiled_prompt_in_chunks_gives_the_same_tokens(
    make_model: Any, padded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tf_generation, "CHUNK", 16)
    check_same(make_model(sliding_window=5), padded(40, 17), max_new_tokens=6)


@pytest.mark.usefixtures("eagerly")
def test_every_row_ends_at_its_own_ending_token(make_model: Any, padded: Any) -> None:
    """With several ending tokens; rows that have ended are padded, and all stop when the last one has."""
    model = make_model(sliding_window=5)
    inputs = padded(7, 12, 4)
    free = model.generate(**inputs, do_sample=False, eos_token_id=None, **LENGTH)[:, 12:]
    ends = [free[0, 2].item(), free[1, 5].item(), free[2, 9].item()]
    found = check_same(model, inputs, eos_token_id=ends, **LENGTH)
    assert found.shape[1] < 12 + 24
    assert (found[:, -1] == 0).any()


def test_programs_are_traced_once(make_model: Any, token_ids: Any) -> None:
    """For prompts of one bucket and any number of new tokens up to the next bucket; the plain graph agrees."""
    ported = to_tf(make_model())
    prompts = [token_ids(2, length).numpy() for length in (5, 9, 16, 17)]
    outputs = [ported.generate(prompt, do_sample=False, max_new_tokens=9) for prompt in prompts[:3]]
    outputs.append(ported.generate(prompts[2], do_sample=False, max_new_tokens=16))
    assert ported._generator.traces == 2
    np.testing.assert_array_equal(outputs[2], outputs[3][:, :25])
    longer = ported.generate(prompts[3], do_sample=False, max_new_tokens=9)
    assert ported._generator.traces == 3  # another prompt program; the window fixes the loop's shapes
    ported.model.norm.weight.assign(ported.model.norm.weight * -1.0)
    assert (ported.generate(prompts[3], do_sample=False, max_new_tokens=9) != longer).numpy().any()
    ported.model.norm.weight.assign(ported.model.norm.weight * -1.0)
    plain = ported.generate(prompts[3], do_sample=False, max_new_tokens=9, jit_compile=False)
    np.testing.assert_array_equal(plain, longer)
    assert ported._generator.traces == 5


def test_a_compiled_step_writes_its_slot_in_place(make_model: Any, token_ids: Any) -> None:
    """Within the loop, nothing but a scatter makes a tensor as large as a layer's keys."""
    ported = to_tf(make_model(sliding_window=7))
    programs = tf_generation._Programs(ported, GenerationOptions(16, 0), True)
    ids = tf.constant(token_ids(2, 16).int().numpy())
    limit = tf.constant(16)
    state = programs.prefill(ids, tf.ones_like(ids, tf.bool), limit, tf.constant(0, tf.int64))
    assert state.cache.keys[0].shape == (2, 2, 7, 12)
    text = programs.decode.experimental_get_compiler_ir(state, limit)(stage="optimized_hlo")
    loop, _, _ = text.partition("\nENTRY ")  # which copies the arguments, once a call
    made = set(re.findall(r"= f32\[2,2,7,12\]\S* ([a-z-]+)\(", loop))
    assert "scatter" in made
    assert made <= {"scatter", "fusion", "call", "parameter", "get-tuple-element", "bitcast"}


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length_penalty": 0.0},
        {"length_penalty": 2.5, "early_stopping": True},
        {"repetition_penalty": 1.7, "num_beams": 4},
    ],
    ids=str,
)
def test_beam_search_matches_pytorch(make_model: Any, padded: Any, options: dict[str, Any]) -> None:
    """Beams that end at different lengths, with two ending tokens."""
    model = make_model(sliding_window=5, initializer_range=0.1)
    inputs = padded(12, 12, 12)
    options = {"max_new_tokens": 12, "num_beams": 3, "eos_token_id": [3, 50], "pad_token_id": 1, **options}
    found = check_same(model, inputs, **options)[:, 12:]
    assert ((found == 3) | (found == 50)).any()


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_search_whose_beams_mostly_end_stops_at_the_step_of_pytorch(
    make_model: Any, padded: Any, monkeypatch: pytest.MonkeyPatch, early_stopping: bool
) -> None:
    """Most candidates end, and the length penalty favours long sequences."""
    model = make_model(sliding_window=5)
    steps: list[str] = []
    model.register_forward_hook(lambda *_: steps.append("theirs"))
    choose = tf_generation.BeamSearch.choose_next
    monkeypatch.setattr(tf_generation.BeamSearch, "choose_next", lambda *args: steps.append("ours") or choose(*args))
    options = {"eos_token_id": list(range(20, 99)), "length_penalty": 2.5, "early_stopping": early_stopping}
    check_same(model, padded(12, 12, 12), num_beams=3, max_new_tokens=12, pad_token_id=1, **options)
    assert 2 <= steps.count("ours") == steps.count("theirs") < 12


def test_compiled_beam_search_matches_pytorch(make_model: Any, padded: Any) -> None:
    model = make_model(sliding_window=5)
    check_same(model, padded(7, 12), num_beams=3, **LENGTH)


def test_several_sequences_of_a_prompt_are_those_of_pytorch(make_model: Any, padded: Any) -> None:
    """Of beam search, compiled, with beams that end early."""
    model = make_model(sliding_window=5, initializer_range=0.1)
    options = {"num_beams": 4, "num_return_sequences": 3, "eos_token_id": [3, 50], "pad_token_id": 1}
    assert len(check_same(model, padded(7, 12), max_new_tokens=12, **options)) == 6


@pytest.mark.usefixtures("eagerly")
def test_several_samples_of_a_prompt_differ(make_model: Any, padded: Any) -> None:
    ported, inputs = to_tf(make_model(sliding_window=5)), arrays(padded(7, 12))
    found = ported.generate(**inputs, do_sample=True, seed=0, num_return_sequences=5, max_new_tokens=8).numpy()
    assert found.shape == (10, 20)
    np.testing.assert_array_equal(found[:, :12], np.repeat(inputs["input_ids"], 5, axis=0))
    assert len({tuple(row) for row in found}) == 10
    with pytest.raises(ValueError, match="num_return_sequences=2 needs as many beams"):
        ported.generate(**inputs, do_sample=False, num_return_sequences=2)


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("size", [1, 7, 8, 1000])
def test_the_size_of_chunks_can_be_chosen(
    make_model: Any, padded: Any, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """At most so many tokens of a prompt are processed together."""
    lengths: list[int] = []
    model = make_model(sliding_window=5)
    ported = to_tf(model)
    embed = ported.model._embed
    monkeypatch.setattr(ported.model, "_embed", lambda ids, embeds: lengths.append(ids.shape[1]) or embed(ids, embeds))
    check_same(model, padded(30, 3), ported, max_new_tokens=3, prefill_chunk_size=size)
    assert max(lengths) == {1: 1, 7: 4, 8: 8, 1000: 32}[size]


@pytest.mark.parametrize(("length", "options"), [(20, {}), (9, {"num_beams": 3, "num_return_sequences": 2})])
def test_generation_within_a_graph_matches_generation_outside(
    make_model: Any, padded: Any, monkeypatch: pytest.MonkeyPatch, length: int, options: dict[str, Any]
) -> None:
    """With padding, in chunks that do not divide the prompt."""
    monkeypatch.setattr(tf_generation, "CHUNK", 16)
    ported, inputs = to_tf(make_model(sliding_window=5)), arrays(padded(length, 4))
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": [], **options}
    inner = tf.function(lambda ids, mask: ported.generate(ids, mask, **options), jit_compile=True, autograph=False)
    found = inner(*(tf.constant(array) for array in inputs.values()))
    assert found.shape == (2 * options.get("num_return_sequences", 1), length + 6)
    np.testing.assert_array_equal(found, ported.generate(**inputs, **options, jit_compile=False))


def test_a_graph_draws_other_samples_at_every_call(make_model: Any, token_ids: Any) -> None:
    """Unless it is given a seed; rows that end early are padded to the full length."""
    ported, ids = to_tf(make_model()), tf.constant(token_ids(2, 6).numpy())
    options = {"do_sample": True, "max_new_tokens": 8, "pad_token_id": 0}
    drawn = tf.function(lambda ids: ported.generate(ids, **options, eos_token_id=list(range(50))), autograph=False)
    first, second = drawn(ids).numpy(), drawn(ids).numpy()
    assert first.shape == (2, 14)
    assert (first != second).any()
    repeated = tf.function(lambda ids: ported.generate(ids, **options, seed=3), autograph=False)
    np.testing.assert_array_equal(repeated(ids), repeated(ids))
    np.testing.assert_array_equal(repeated(ids), ported.generate(ids, **options, seed=3, jit_compile=False))
    with pytest.raises(ValueError, match="cannot be streamed out of a graph"):
        tf.function(lambda ids: ported.generate(ids, streamer=Recorder()), autograph=False)(ids)


@pytest.mark.usefixtures("eagerly")
def test_prompts_may_be_a_mapping_or_have_the_name_of_the_library(make_model: Any, padded: Any) -> None:
    ported, inputs = to_tf(make_model()), arrays(padded(7, 4))
    expected = ported.generate(**inputs, do_sample=False, max_new_tokens=3)
    np.testing.assert_array_equal(ported.generate(inputs, do_sample=False, max_new_tokens=3), expected)
    ids, mask = inputs.values()
    named = ported.generate(inputs=ids, attention_mask=mask, do_sample=False, max_new_tokens=3)
    np.testing.assert_array_equal(named, expected)
    with pytest.raises(ValueError, match="Pass input_ids, not nothing"):
        ported.generate(max_new_tokens=3)


@pytest.mark.usefixtures("eagerly")
def test_the_repetition_penalty_matches_pytorch_and_does_not_count_padding(make_model: Any, token_ids: Any) -> None:
    model = make_model(sliding_window=5)
    ids = token_ids(2, 12)
    options = {"repetition_penalty": 1.8, "do_sample": False, "max_new_tokens": 10, "eos_token_id": []}
    ported = to_tf(model)
    found = check_same(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ported, **options)
    first = int(found[0, 12])  # the padding's id: a penalty of it would change the tokens
    assert first not in ids[0]
    padded = np.pad(ids.numpy(), [(0, 0), (3, 0)], constant_values=first), np.pad(np.ones_like(ids), [(0, 0), (3, 0)])
    np.testing.assert_array_equal(ported.generate(*padded, **options)[:, 3:], found)


def test_the_rules_of_sampling_match_transformers() -> None:
    logits = torch.randn(4, 99) * 1.5
    options = GenerationOptions(1, 0, do_sample=True, temperature=0.7, top_k=20, top_p=0.9, min_p=0.05)
    rules = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)]
    expected = logits
    counts = []
    for rule in rules:
        expected = rule(None, expected)
        counts.append(expected.isfinite().sum())
    assert counts[0] > counts[1] > counts[2] > counts[3] > 4
    np.testing.assert_allclose(tf_logits.warped(tf.constant(logits.numpy()), options), expected, rtol=1e-6)
    all_of_them = GenerationOptions(1, 0, do_sample=True, top_k=100)
    np.testing.assert_array_equal(tf_logits.warped(tf.constant(logits.numpy()), all_of_them), logits)


def test_penalized_scores_match_transformers() -> None:
    logits = torch.randn(4, 99) * 1.5
    ids = torch.randint(99, (4, 12))
    previous_tokens = torch.zeros(4, 99, dtype=torch.bool).scatter(1, ids, True)
    penalized = tf_logits.penalized(tf.constant(logits.numpy()), tf.constant(previous_tokens.numpy()), 1.3)
    np.testing.assert_allclose(penalized, RepetitionPenaltyLogitsProcessor(1.3)(ids, logits), rtol=1e-6)


def test_a_seed_repeats_sampling_and_tokens_follow_their_probabilities(make_model: Any, token_ids: Any) -> None:
    """Without a seed, Python's own repeats it."""
    ported = to_tf(make_model(num_hidden_layers=1, initializer_range=0.05))
    prompt = np.repeat(token_ids(1, 6).numpy(), 400, axis=0)
    options = {"do_sample": True, "max_new_tokens": 2, "top_k": 3, "temperature": 0.3}
    first = ported.generate(prompt, seed=0, **options)
    for seed, same in [(0, True), (np.int64(0), True), (1, False), (2**40, False), (-1, False)]:
        assert (ported.generate(prompt, seed=seed, **options) == first).numpy().all() == same
    pairs = []
    for _ in range(2):
        tf.keras.utils.set_random_seed(7)
        pairs.append([ported.generate(prompt, **options).numpy() for _ in range(2)])
    np.testing.assert_array_equal(pairs[0], pairs[1])
    assert (pairs[0][0] != pairs[0][1]).any()
    logits, tokens = tf.math.top_k(ported(prompt[:1]).logits[0, -1], 3)
    drawn = first[:, 6].numpy()
    assert set(drawn) == set(tokens.numpy())
    for token, chance in zip(tokens.numpy(), tf.nn.softmax(logits / 0.3).numpy(), strict=True):
        assert abs((drawn == token).mean() - chance) < 3 * (chance * (1 - chance) / 400) ** 0.5
    ported.lm_head.weight.assign(tf.zeros_like(ported.lm_head.weight))
    pairs = ported.generate(prompt, seed=0, **options).numpy()[:, 6:]  # all tokens are as good as the third
    assert (pairs[:, 0] == pairs[:, 1]).sum() < 20  # of 400, each with a chance of 1 in 99


def test_sampled_tokens_follow_their_probabilities() -> None:
    rows, chances = 20000, [0.7, 0.2, 0.1]
    logits = tf.repeat(tf.math.log([chances]), rows, axis=0)
    strategy = tf_generation.Sampling(GenerationOptions(1, 0, do_sample=True))
    drawn = strategy.result(strategy.choose_first(logits, None, None, None, tf.constant(0, tf.int64)))[:, 0]
    np.testing.assert_allclose(np.bincount(drawn) / rows, chances, atol=0.01)


class Recorder:
    """A streamer that keeps what it receives."""

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.ended = False

    def put(self, value: Any) -> None:
        self.parts.append(np.atleast_1d(value.squeeze()))

    def end(self) -> None:
        self.ended = True


def test_a_streamer_receives_the_prompt_and_every_token(
    make_model: Any, token_ids: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ported = to_tf(make_model())
    prompt, recorder = token_ids(1, 6).numpy(), Recorder()
    options = {"do_sample": False, "max_new_tokens": 9}
    expected = ported.generate(prompt, **options)[0]
    end = expected[10].numpy()
    np.testing.assert_array_equal(ported.generate(prompt, streamer=recorder, **options)[0], expected)
    assert ported._generator.traces == 2
    assert recorder.ended
    assert [len(part) for part in recorder.parts] == [6] + [1] * 9
    np.testing.assert_array_equal(np.concatenate(recorder.parts), expected)
    ported.generate(prompt, streamer=TextStreamer(tokenizer, skip_prompt=True), **options)
    assert capsys.readouterr().out == tokenizer.decode(expected[6:]) + "\n"
    stopped = Recorder()
    short = ported.generate(prompt, streamer=stopped, **options, eos_token_id=int(end))[0]
    np.testing.assert_array_equal(np.concatenate(stopped.parts), short)
    assert short[-1] == end
    assert len(short) <= 11
    with pytest.raises(ValueError, match="num_beams=2 cannot be streamed"):
        ported.generate(prompt, streamer=recorder, num_beams=2)


def test_bad_prompts_and_unknown_options_are_refused(make_model: Any, padded: Any) -> None:
    ported = to_tf(make_model())
    with pytest.raises(ValueError, match="padding_side = 'left'"):
        ported.generate(**arrays(padded(7, 4, side="right")))
    with pytest.raises(ValueError, match="every row of attention_mask must be zeros, then ones"):
        ported.generate([[1, 2, 3]], [[1, 0, 1]])
    with pytest.raises(ValueError, match=r"must lie in \[0, 99\)"):
        ported.generate([[1, 99]])
    with pytest.raises(ValueError, match="no option 'penalty_alpha'; it takes max_new_tokens"):
        ported.generate([[1, 2]], penalty_alpha=0.6)
    with pytest.raises(ValueError, match=r"typical_p=0\.5, which this port does not have"):
        ported.generate([[1, 2]], generation_config=GenerationConfig(typical_p=0.5))


def test_compiled_generation_in_bfloat16_follows_the_likeliest_tokens(make_model: Any, token_ids: Any) -> None:
    """Within the rounding of the logits."""
    ported = to_tf(make_model(sliding_window=5, num_hidden_layers=1), "bfloat16")
    ids = ported.generate(token_ids(1, 9).numpy(), do_sample=False, max_new_tokens=8, eos_token_id=[])
    logits = tf.cast(ported(input_ids=ids).logits, tf.float32)[0, 8:-1]
    chosen = tf.gather(logits, ids[0, 9:], batch_dims=1)
    np.testing.assert_array_less(tf.reduce_max(logits, axis=-1) - chosen, 0.05 * tf.reduce_max(tf.abs(logits)))
