"""Methods of the TensorFlow classes in Transformers 4, and their options that have another form here.

`tests/tf/migration.py` lists every old form, those that work as they are too.

Legend: B batch, S tokens, E hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from transformers import DataCollatorWithPadding, DefaultDataCollator

from .shapes import Tensor

_LABELS = ("labels", "label", "label_ids")  # columns that the library's collators call "labels"

_PYTORCH = "the PyTorch model, which quantizes; here dtype='bfloat16' halves the weights"
_SCORES = "the tokens alone, whose scores are model(tokens).logits"

NEW_FORMS: dict[str, dict[str, str]] = {
    "from_pretrained": {
        "from_flax": "nothing: the checkpoints of the JAX port are the same safetensors files",
        "ignore_mismatched_sizes": "nothing: weights of another head are left out or initialised, with a warning",
        "load_in_4bit": _PYTORCH,
        "load_in_8bit": _PYTORCH,
        "proxies": "the environment variables HTTP_PROXY and HTTPS_PROXY",
        "quantization_config": _PYTORCH,
        "resume_download": "nothing: downloads are always resumed",
        "subfolder": "the folder itself: from_pretrained('folder/subfolder')",
        "use_auth_token": "token=...",
    },
    "save_pretrained": {
        "signatures": "model.export(folder, input_signature=[...])",
        "version": "model.export('folder/saved_model/2')",
    },
    "generate": {
        "logits_processor": "options such as repetition_penalty, or a loop over calls with past_key_values",
        "output_scores": _SCORES,
        "return_dict_in_generate": _SCORES,
    },
}


def check_old_options(where: str, options: Mapping[str, Any]) -> None:
    """Check that a call has no option in a form of before.

    Raises:
        ValueError: It has; the message says the new form.
    """
    for name in options:
        if name in NEW_FORMS[where]:
            raise ValueError(f"{where} has no option {name!r} any more. In its place: {NEW_FORMS[where][name]}.")


class LibraryMethods(keras.Model):
    """What `TFPreTrainedModel` had beside loading, saving and training."""

    config: Any
    generation_config: Any
    default_initializer: Callable[[], Any]

    def head_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """The loss of the model's head for labels at the positions of the logits.

        Raises:
            ValueError: The model has no head.
        """
        raise ValueError(f"{type(self).__name__} has no head, so no loss: use a class such as TFMistralForCausalLM.")

    def hf_compute_loss(self, labels: Any, logits: Tensor) -> Tensor:
        """The loss of logits: as of a call with labels, except that a language model's labels are not shifted.

        Args:
            labels: As of the model.
            logits: As the model returns them; of a language model ``logits[:, :-1]`` for ``labels[:, 1:]``.

        Returns:
            A scalar.
        """
        return self.head_loss(tf.convert_to_tensor(labels), logits)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """A batch of arbitrary ids of the vocabulary."""
        ids = tf.constant([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]])
        return {"input_ids": ids % self.config.vocab_size, "attention_mask": tf.ones_like(ids)}

    @property
    def input_signature(self) -> dict[str, tf.TensorSpec]:
        """``input_ids`` and ``attention_mask``, ``[B, S]`` int32 of any sizes."""
        return {name: tf.TensorSpec([None, None], tf.int32, name) for name in ("input_ids", "attention_mask")}

    @property
    def serving(self) -> Any:
        """The forward pass for `input_signature`, as a function whose signature `tf.saved_model.save` takes."""
        return tf.function(lambda inputs: dict(self(inputs)), input_signature=[self.input_signature], autograph=False)

    def export(
        self, filepath: str | Path, format: str = "tf_saved_model", *, input_signature: Any = None, **kwargs: Any
    ) -> None:
        """Write the forward pass for serving, as `keras.Model.export` does.

        Args:
            filepath: The target.
            format: One of Keras's formats.
            input_signature: By default a list of the model's own `input_signature`.
            **kwargs: Other arguments of `keras.Model.export`.
        """
        signature = input_signature or [self.input_signature]
        super().export(str(filepath), format, input_signature=signature, **kwargs)

    def get_input_embeddings(self) -> Any:
        """The layer of the token embeddings, whose ``weight`` is ``[V, E]``."""
        decoder: Any = getattr(self, "model", self)
        return decoder.embed_tokens

    def get_output_embeddings(self) -> Any:
        """The layer of the output embeddings: ``lm_head``, the tied token embeddings, or None without a vocabulary."""
        if not hasattr(self, "lm_head"):
            return None
        return self.get_input_embeddings() if self.lm_head is None else self.lm_head

    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> Any:
        """Change the size of the vocabulary: of the embeddings, of an untied output layer, and of the configuration.

        New rows are newly initialised. A model that was compiled has to be compiled again.

        Args:
            new_num_tokens: V; None changes nothing.

        Returns:
            The layer of the token embeddings.

        Raises:
            ValueError: It is not positive.
        """
        embeddings = self.get_input_embeddings()
        if new_num_tokens is None or new_num_tokens == self.config.vocab_size:
            return embeddings
        if new_num_tokens < 1:
            raise ValueError(f"new_num_tokens={new_num_tokens} must be at least 1.")
        for layer in {id(layer): layer for layer in (embeddings, self.get_output_embeddings()) if layer}.values():
            layer.resize_rows(new_num_tokens, self.default_initializer())
        self.config.vocab_size = new_num_tokens
        self.forget_programs()
        return embeddings

    def forget_programs(self) -> None:
        """Drop what was compiled for the present shapes of the weights."""
        self.train_function = self.test_function = self.predict_function = None

    def prepare_tf_dataset(
        self,
        dataset: Any,
        batch_size: int = 8,
        shuffle: bool = True,
        tokenizer: Any = None,
        collate_fn: Callable[..., Any] | None = None,
        collate_fn_args: dict[str, Any] | None = None,
        drop_remainder: bool | None = None,
        prefetch: bool = True,
    ) -> Any:
        """A `tf.data.Dataset` of batches for `fit` from a data set of the library `datasets`.

        Columns that the model does not take are left out. Labels stay among the inputs, for the model's own loss.

        Args:
            dataset: A `datasets.Dataset`.
            batch_size: B.
            shuffle: Whether to shuffle; the last batch is then left out unless it is full.
            tokenizer: Pads the rows of a batch; without one, they must have equal lengths.
            collate_fn: Makes a dictionary of arrays of a list of rows, in place of both.
            collate_fn_args: Its keywords.
            drop_remainder: Whether to leave out the last batch unless it is full; by default as `shuffle`.
            prefetch: Whether to prepare batches ahead.

        Raises:
            TypeError: The data set is not one of `datasets`.
        """
        if not hasattr(dataset, "to_tf_dataset"):
            raise TypeError(
                f"The data set is a {type(dataset).__name__}, but must be a datasets.Dataset; a tf.data.Dataset of"
                " dictionaries is passed to fit as it is."
            )
        if collate_fn is None:
            collate_fn = DefaultDataCollator("np")
            if tokenizer is not None:
                collate_fn = DataCollatorWithPadding(tokenizer, return_tensors="np")
        wanted = {*_LABELS, "input_ids", "attention_mask", "position_ids"}
        dataset = dataset.remove_columns([name for name in dataset.column_names if name not in wanted])
        return dataset.to_tf_dataset(
            batch_size=batch_size,
            shuffle=shuffle,
            collate_fn=collate_fn,
            collate_fn_args=collate_fn_args,
            drop_remainder=shuffle if drop_remainder is None else drop_remainder,
            prefetch=prefetch,
        )
