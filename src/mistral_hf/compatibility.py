"""Which checkpoints a Mistral model takes: weights of decoder and head, quantization; for all three frameworks."""

import re
from collections.abc import Iterable
from typing import Any

HEADS = ("lm_head.", "score.", "qa_outputs.")  # weights that a checkpoint may lack, or have beyond those of the model
BASE_PREFIX = "model."  # of the decoder's weights in a checkpoint with a head


_LONGEST_MESSAGE = 1000  # characters


def one_line(text: str) -> str:
    """Text for one line of a terminal: unprintable characters are escaped, and the middle of a long text is cut."""
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[: _LONGEST_MESSAGE // 2]} [...] {text[-_LONGEST_MESSAGE // 2 :]}"
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and the remedy, on one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def check_model_type(source: Any, model_type: str | None) -> None:
    """Check that a checkpoint says that it holds a Mistral model, or nothing about it.

    Args:
        source: Names the checkpoint in a message.
        model_type: Of its config.json.

    Raises:
        CheckpointError: It is a model of another architecture.
    """
    if model_type not in (None, "", "mistral"):
        raise CheckpointError(
            f"The checkpoint {str(source)!r} holds a model of model_type={model_type!r}, not 'mistral', which computes"
            " another function, whatever its weights are called: load it with transformers.AutoModel. If its"
            " config.json is wrong, set model_type to 'mistral' there."
        )


def check_decoder_weights(source: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Check that a checkpoint and a model differ in head weights only.

    Args:
        source: Names the checkpoint in a message.
        missing: Weights that the checkpoint lacks.
        unexpected: Weights that the model does not have.

    Raises:
        CheckpointError: Weights of the decoder are missing or unknown.
    """
    for names, problem in ((missing, "lacks"), (unexpected, "has unknown")):
        if decoder := sorted(name for name in names if not name.startswith(HEADS) and "rotary_emb" not in name):
            raise CheckpointError(
                f"The checkpoint {str(source)!r} {problem} {len(decoder)} weights of a Mistral decoder, the first of"
                f" them {', '.join(decoder[:3])}. Its config.json and its weights do not belong together: download both"
                " again from the same place, or convert raw Mistral weights first."
            )


def layers_left_out(unexpected: Iterable[str], num_hidden_layers: int) -> set[str]:
    """The unexpected weights that belong to decoder layers beyond `num_hidden_layers`."""
    layers = ((name, re.search(r"(?:^|\.)layers\.(\d+)\.", name)) for name in unexpected)
    return {name for name, layer in layers if layer is not None and int(layer[1]) >= num_hidden_layers}


def check_quantization(config: Any, requested: Any) -> None:
    """Check that a quantized checkpoint is not quantized again in another way: its full precision is lost.

    Args:
        config: The checkpoint's configuration, or None if it is not known yet.
        requested: The quantization configuration that the caller gives, a dictionary or an object; None for none.

    Raises:
        ValueError: The checkpoint is quantized in another way.
    """
    present = getattr(config, "quantization_config", None)
    if requested is None or present is None:
        return
    old, new = (found if isinstance(found, dict) else found.to_dict() for found in (present, requested))
    for name in ("quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        if name in old and name in new and old[name] != new[name]:
            raise ValueError(
                f"The checkpoint is quantized with {name}={old[name]!r} and cannot be quantized again with"
                f" {new[name]!r}: leave out quantization_config, or start from the checkpoint in full precision."
            )
