"""Shared fixtures: tiny random models, the reference with the same weights, inputs with padding, a tokenizer."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import mistral_hf
from tests.helpers.family import FAMILIES

torch.set_num_threads(1)

HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
VOCABULARY = 99
SEQUENCE_LENGTHS = (7, 12, 3)
TEXT = "the quick brown fox jumps over the lazy dog . in the beginning was the word , and the word was good ."


class Pair(NamedTuple):
    """One of our models, and the reference model (stock Transformers) with the same weights."""

    ours: Any
    stock: Any

    def __call__(self, **inputs: Any) -> tuple[Any, Any]:
        """The outputs of both."""
        return self.ours(**inputs), self.stock(**inputs)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., dict[str, Any]]:
    """Fields of a tiny configuration: grouped heads, a head_dim that is not hidden_size / heads, a window of 8.

    Weights are ten times as large as usual: attention is far from uniform, and logits are of order 1.
    """

    def fields(**overrides: Any) -> dict[str, Any]:
        defaults = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "max_position_embeddings": 1024,
            "sliding_window": 8,
            "initializer_range": 0.2,
            "pad_token_id": 0,
        }
        return {**defaults, **overrides}

    return fields


@pytest.fixture(scope="session")
def make_model(request: pytest.FixtureRequest, tiny: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """Builds one of our models from `tiny` with overrides, in eval mode; norms and biases are random as well.

    The models are of the type ``mistral``, or of the one that `FAMILY` names.
    """
    family = FAMILIES[getattr(request, "param", "mistral")]

    def make(head: str = "ForCausalLM", implementation: str = "sdpa", seed: int = 0, **overrides: Any) -> Any:
        torch.manual_seed(seed)
        config = family.config(**family.fields(tiny(**overrides)), attn_implementation=implementation)
        model = getattr(family.modeling, f"{family.stem}{head}")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model

    return make


@pytest.fixture(scope="session")
def to_stock() -> Callable[[Any], Any]:
    """Builds the reference model with the configuration and the weights of one of ours."""

    def convert(model: Any) -> Any:
        family, fields = FAMILIES[model.config.model_type], model.config.to_dict()
        if model.config.model_type == "ministral" and fields["sliding_window"] is None:
            fields["sliding_window"] = 1  # the reference needs one for a mask, even where no layer has a window
        config = family.stock_config.from_dict(fields, attn_implementation=model.config._attn_implementation)
        stock = getattr(family.stock_modeling, type(model).__name__)(config).to(model.dtype).eval()
        stock.load_state_dict(model.state_dict())
        if model.config.query_scaling is not None:
            stock.base_model.register_forward_pre_hook(count_real_tokens, with_kwargs=True)
        return stock

    return convert


def count_real_tokens(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give the reference the positions of ours, whose first real token has position 0.

    Unless it is told, it counts padding too, which shows where queries are scaled by their position.
    """
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is None and isinstance(mask, Tensor) and mask.ndim == 2:
        tokens = next(
            found for found in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if found is not None
        )
        positions = torch.arange(mask.shape[1]) - mask.long().argmax(dim=1, keepdim=True)
        kwargs["position_ids"] = positions.clamp(min=0)[:, -tokens.shape[1] :]
    return args, kwargs


@pytest.fixture(scope="session")
def make_pair(make_model: Callable[..., Any], to_stock: Callable[[Any], Any]) -> Callable[..., Pair]:
    """Builds a `Pair`; arguments as for `make_model`."""

    def make(*args: Any, **kwargs: Any) -> Pair:
        model = make_model(*args, **kwargs)
        return Pair(model, to_stock(model))

    return make


@pytest.fixture(scope="session")
def token_ids() -> Callable[..., Tensor]:
    """Random ids ``[B, S]`` without the padding id 0."""

    def draw(batch: int, length: int, seed: int = 1) -> Tensor:
        return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def padded(token_ids: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    """Rows of the given lengths, padded with id 0, as ``input_ids`` and ``attention_mask``."""

    def pad(*lengths: int, side: str = "left", width: int | None = None) -> dict[str, Tensor]:
        width = width or max(lengths)
        indices = torch.arange(width).expand(len(lengths), -1)
        counts = torch.tensor(lengths)[:, None]
        mask = (indices >= width - counts if side == "left" else indices < counts).long()
        return {"input_ids": token_ids(len(lengths), width) * mask, "attention_mask": mask}

    return pad


@pytest.fixture
def sequences(token_ids: Callable[..., Tensor]) -> list[dict[str, list[int]]]:
    """Three texts of different lengths; the first token of each is not a label."""
    rows = [token_ids(1, length, seed=length)[0].tolist() for length in SEQUENCE_LENGTHS]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]


@pytest.fixture
def checkpoint(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A folder with a tiny `MistralForCausalLM`."""
    make_model().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing is compiled before the test, and nothing stays compiled after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def registered() -> Iterator[None]:
    """Registers the models again after a test that changes the registration."""
    yield
    mistral_hf.register()


@pytest.fixture(scope="session")
def rope_parameters() -> Callable[[str], dict[str, Any]]:
    """Parameters of a rotary embedding type for a head_dim of 12 and 64 pretrained positions."""
    parameters = {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
        "longrope": {
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        },
        "llama3": {
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "proportional": {"partial_rotary_factor": 0.5},
    }
    return lambda kind: {"rope_type": kind, "rope_theta": 100.0, **parameters[kind]}
