"""Random configurations and inputs: the TensorFlow port computes what the PyTorch model does, in float32."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import mistral_hf
from mistral_hf import MistralConfig
from mistral_hf.modeling_mistral import MistralRotaryEmbedding
from mistral_hf.rope import ROTARY_TYPES
from tests.helpers.tf_models import tf, to_tf

IGNORED = -100
TIE = 1e-3  # two scores that are closer may be in either order


class Case(NamedTuple):
    """A model with a batch for it.

    Attributes:
        layout: How the rows lie: ``"plain"``, ``"left"``, ``"right"``, ``"mixed"`` (both sides) or ``"packed"``.
        generation: Options of `generate`.
        cuts: Where the cached call is cut into chunks.
    """

    config: MistralConfig
    layout: str
    inputs: dict[str, Any]
    labels: Any
    generation: dict[str, Any]
    cuts: list[int]


@pytest.fixture
def eagerly() -> Iterator[None]:
    """No program is traced or compiled."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def rotary(draw: np.random.Generator, head_dim: int) -> dict[str, Any]:
    """Random parameters of a random rotary type, of which the window of long positions is short."""
    kind, length = str(draw.choice(sorted(ROTARY_TYPES))), int(draw.choice([8, 16, 64]))
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": float(draw.choice([50.0, 1e4, 1e6]))}
    if kind in ("linear", "dynamic", "yarn", "longrope", "llama3"):
        parameters["factor"] = float(draw.choice([1.5, 4.0]))
    if kind in ("yarn", "longrope", "llama3"):
        parameters["original_max_position_embeddings"] = length
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        short, long = draw.uniform(1, 2, head_dim // 2), draw.uniform(1, 6, head_dim // 2)
        parameters |= {"short_factor": short.tolist(), "long_factor": long.tolist()}
    if kind == "proportional":
        parameters["partial_rotary_factor"] = 0.5
    return parameters


def configuration(draw: np.random.Generator) -> MistralConfig:
    kv_heads, groups, head_dim = (int(draw.choice(values)) for values in ([1, 2, 3], [1, 2, 4], [4, 8, 12, 16]))
    return MistralConfig(
        vocab_size=int(draw.integers(20, 99)),
        hidden_size=int(draw.choice([8, 24, 32])),
        intermediate_size=int(draw.choice([16, 48])),
        num_hidden_layers=int(draw.integers(1, 3)),
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=str(draw.choice(["silu", "gelu", "relu2", "gelu_pytorch_tanh"])),
        max_position_embeddings=int(draw.choice([8, 16, 1024])),
        initializer_range=0.2,
        rms_norm_eps=float(draw.choice([1e-6, 1e-5])),
        sliding_window=None if draw.random() < 0.25 else int(draw.choice([1, 2, 3, 5, 8, 16])),
        rope_parameters=rotary(draw, head_dim),
        tie_word_embeddings=bool(draw.random() < 0.3),
        label_smoothing=float(draw.choice([0.0, 0.1])),
        loss_chunk_size=None if draw.random() < 0.5 else int(draw.integers(1, 40)),
        pad_token_id=None,  # an embedding of zeros makes all next tokens equally likely
        bos_token_id=None,
        eos_token_id=None,
    )


def padding(draw: np.random.Generator, layout: str, batch: int, length: int) -> Any:
    """A mask whose rows have between 1 and all tokens."""
    columns, mask = np.arange(length), np.ones((batch, length), int)
    for row in range(batch):
        pads, side = int(draw.integers(0, length)), layout
        if layout == "mixed":
            side = str(draw.choice(["left", "right"]))
        mask[row] = columns >= pads if side == "left" else columns < length - pads
    return mask


def case(seed: int) -> Case:
    """The case of a seed."""
    draw = np.random.default_rng(seed)
    config = configuration(draw)
    batch, length = int(draw.integers(1, 4)), int(draw.integers(2, 26))
    ids = draw.integers(0, config.vocab_size, (batch, length))
    layout = str(draw.choice(["plain", "left", "right", "mixed", "packed"]))
    inputs: dict[str, Any] = {"input_ids": ids}
    if layout in ("left", "right", "mixed"):
        inputs["attention_mask"] = padding(draw, layout, batch, length)
    if layout == "packed":
        restarts = draw.random((batch, length)) < 0.2
        restarts[:, 0] = True
        starts = np.maximum.accumulate(np.where(restarts, np.arange(length), 0), axis=1)
        inputs["position_ids"] = np.arange(length) - starts
    labels = np.where(draw.random((batch, length)) < 0.3, IGNORED, ids)
    if "attention_mask" in inputs:
        before = np.pad(inputs["attention_mask"][:, :-1], [(0, 0), (1, 0)])  # padding predicts nothing
        labels = np.where(inputs["attention_mask"] & before, labels, IGNORED)
    generation: dict[str, Any] = {"do_sample": False, "max_new_tokens": int(draw.integers(1, 9)), "pad_token_id": 1}
    if draw.random() < 0.5:
        generation["num_beams"] = int(draw.integers(2, 5))
        generation["num_return_sequences"] = int(draw.integers(1, generation["num_beams"] + 1))
        generation["length_penalty"] = float(draw.choice([0.0, 1.0, 2.0]))
        generation["early_stopping"] = bool(draw.random() < 0.5)
    if draw.random() < 0.5:
        generation["eos_token_id"] = draw.choice(config.vocab_size, 4, replace=False).tolist()
    if draw.random() < 0.3 and layout == "plain":  # the library penalizes the ids of padding too
        generation["repetition_penalty"] = 1.3
    # Where frequencies depend on the length of a call, the result depends on the chunks, of which padding is a part.
    if draw.random() < 0.3 and config.rope_parameters["rope_type"] not in ("dynamic", "longrope"):
        generation["prefill_chunk_size"] = int(draw.integers(1, 9))
    cuts = sorted({0, length, *draw.integers(0, length, 3).tolist()})
    # PyTorch's frequencies grow with the length of a chunk that is padding only, and do not shrink again.
    if "attention_mask" in inputs and config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        cuts = [0, length]
    return Case(config, layout, inputs, labels, generation, cuts)


def fresh(model: Any) -> Any:
    """The PyTorch model; its dynamic frequencies forget the longest sequence so far."""
    model.model.rotary_emb = MistralRotaryEmbedding(model.config)
    return model


def check_close(found: Any, expected: Any, where: Any) -> None:
    expected = expected.detach().numpy()
    atol = 1e-4 * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(np.asarray(found)[where], expected[where], rtol=0, atol=atol)


def first_difference_is_a_tie(model: Any, found: Any, expected: Any, prompt: Any, penalty: float) -> bool:
    """Whether the scores of the tokens where greedy continuations part are as good as equal."""
    row, column = np.argwhere(found != expected)[0]
    known, begin = prompt["attention_mask"][row].bool(), prompt["input_ids"].shape[1]
    tokens = torch.cat([prompt["input_ids"][row][known], torch.tensor(expected[row, begin:column])])
    scores = fresh(model)(tokens[None]).logits[0, -1]
    scores[tokens] = torch.where(scores < 0, scores * penalty, scores / penalty)[tokens]
    return abs(scores[int(found[row, column])] - scores[int(expected[row, column])]) < TIE


def check_generation(model: Any, ported: Any, case: Case, counts: Counter[str]) -> None:
    """Prompts are padded on the left."""
    ids = case.inputs["input_ids"]
    mask = case.inputs.get("attention_mask", np.ones_like(ids))  # the library would infer one from padding ids
    width, lengths = ids.shape[1], mask.sum(axis=1, keepdims=True)
    inputs = {"input_ids": ids, "attention_mask": (np.arange(width) >= width - lengths).astype(int)}
    prompt = {name: torch.tensor(array) for name, array in inputs.items()}
    expected = fresh(model).generate(**prompt, **case.generation).numpy()
    ends = case.generation.get("eos_token_id", [])
    found = ported.generate(**inputs, **{**case.generation, "eos_token_id": ends}).numpy()
    beams = case.generation.get("num_beams", 1)
    if found.shape == expected.shape and (found == expected).all():
        counts["beams" if beams > 1 else "greedy"] += 1
        return
    penalty = case.generation.get("repetition_penalty", 1.0)
    tie = beams == 1 and first_difference_is_a_tie(model, found, expected, prompt, penalty)
    assert tie, f"{found} instead of {expected}"
    counts["ties"] += 1


def check_cached(model: Any, ported: Any, case: Case) -> None:
    """Chunk by chunk, in both."""
    ids, mask, cache, theirs = case.inputs["input_ids"], case.inputs.get("attention_mask"), None, None
    fresh(model)
    for start, end in zip(case.cuts, case.cuts[1:], strict=False):
        seen = None if mask is None else mask[:, :end]
        outputs = ported(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True)
        known = None if mask is None else torch.tensor(seen)
        chunk = torch.tensor(ids[:, start:end])
        expected = model(chunk, attention_mask=known, past_key_values=theirs, use_cache=True)
        cache, theirs = outputs.past_key_values, expected.past_key_values
        check_close(outputs.logits, expected.logits, ... if mask is None else mask[:, start:end].astype(bool))


@torch.no_grad()
def check(seed: int, counts: Counter[str]) -> None:
    """Logits, loss, chunks through the cache, and generated tokens of one case."""
    found_case = case(seed)
    torch.manual_seed(seed)
    model = mistral_hf.MistralForCausalLM(found_case.config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    ported = to_tf(model)
    inputs = found_case.inputs
    tensors = {name: torch.tensor(array) for name, array in inputs.items()}
    where = inputs["attention_mask"].astype(bool) if "attention_mask" in inputs else ...
    check_close(ported(inputs).logits, fresh(model)(**tensors).logits, where)
    expected = fresh(model)(**tensors, labels=torch.tensor(found_case.labels))
    outputs = ported({**inputs, "labels": found_case.labels})
    np.testing.assert_allclose(outputs.loss, expected.loss, rtol=2e-4, atol=1e-5)
    assert (outputs.logits is None) == (expected.logits is None)
    if found_case.layout != "packed":
        check_cached(model, ported, found_case)
        check_generation(model, ported, found_case, counts)
    counts[found_case.layout] += 1
    counts[found_case.config.rope_parameters["rope_type"]] += 1


@pytest.mark.filterwarnings("ignore:All labels of a batch are ignored")
@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("seed", range(6))
def test_a_random_configuration_matches_pytorch(seed: int) -> None:
    check(seed, Counter())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:All labels of a batch are ignored")
@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("part", range(10))
def test_a_thousand_random_configurations_match_pytorch(part: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(1000 + 100 * part, 1100 + 100 * part):
        try:
            check(seed, counts)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {case(seed)}") from error
    print(dict(counts))


@pytest.fixture(scope="module")
def small() -> Any:
    config = MistralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1,
    )  # fmt: skip
    return mistral_hf.TFMistralForCausalLM(config)


IDS = np.arange(10).reshape(2, 5)
BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "ids of one dimension": ({"input_ids": [1, 2]}, r"input_ids is int64 \(2,\)"),
    "ids of three dimensions": ({"input_ids": IDS[None]}, r"input_ids is int64 \(1, 2, 5\)"),
    "fractional ids": ({"input_ids": IDS / 2}, "input_ids is float"),
    "negative ids": ({"input_ids": IDS - 1}, r"input_ids span \[-1, 8\]"),
    "ids beyond the vocabulary": ({"input_ids": IDS + 15}, r"must lie in \[0, 20\)"),
    "ragged ids": ({"input_ids": [[1, 2], [3]]}, r"input_ids has rows of lengths \[2, 1\]"),
    "text": ({"input_ids": [["a", "b"]]}, "input_ids is string"),
    "a short mask": ({"input_ids": IDS, "attention_mask": np.ones((2, 4))}, r"attention_mask has shape \(2, 4\)"),
    "a mask of one dimension": ({"input_ids": IDS, "attention_mask": np.ones(5)}, r"attention_mask has shape \(5,\)"),
    "a mask of other rows": ({"input_ids": IDS, "attention_mask": np.ones((3, 5))}, "attention_mask has shape"),
    "a ragged mask": ({"input_ids": IDS, "attention_mask": [[1], [1, 1]]}, "attention_mask has rows of lengths"),
    "short positions": ({"input_ids": IDS, "position_ids": IDS[:, 1:]}, r"position_ids has shape \(2, 4\)"),
    "positions that restart under a mask": (
        {"input_ids": IDS, "position_ids": [[0, 1, 0, 1, 2]], "attention_mask": np.ones((2, 5))},
        r"position_ids\[0, 2\] restarts at 0",
    ),
    "short labels": ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"labels of shape \(2, 4\) do not fit"),
    "fractional labels": ({"input_ids": IDS, "labels": IDS / 2}, "labels are float"),
    "labels beyond the vocabulary": ({"input_ids": IDS, "labels": IDS + 15}, "labels hold 2"),
    "an unknown input": ({"input_ids": {"input_ids": IDS, "tokens": IDS}}, "a tensor 'tokens'"),
    "nothing": ({}, "exactly one of input_ids and inputs_embeds, not neither"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_named(small: Any, name: str) -> None:
    inputs, message = BAD_INPUTS[name]
    with pytest.raises(ValueError, match=message):
        small(**inputs)
