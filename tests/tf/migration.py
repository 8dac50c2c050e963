"""Calls as they were written for the TensorFlow classes of Transformers 4, each with its form here; all rows are run.

``python -m tests.tf.migration`` prints the table in Markdown. Expressions use these names: `model` (a
`TFMistralForCausalLM`), `config`, `folder` (its checkpoint), `target` (a new folder), `ids`, `mask` and `labels`
(arrays), `tokens` (what a tokenizer returns), `prompts` (a tensor of ids), `symbols` (two `keras.Input`), `dataset` (of
the library `datasets`), and the modules `tf`, `keras` and `mistral_hf`.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """One old form.

    Attributes:
        old: An expression in the old form.
        new: The same in the form of this package; "" if it is the old one.
        refused: What the error says where the old form is refused; "" where it works.
        equal: Whether the values of both are compared, rather than their types.
    """

    old: str
    new: str = ""
    refused: str = ""
    equal: bool = True


_INPUTS = '{"input_ids": ids, "attention_mask": mask}'

ROWS: tuple[Row, ...] = (
    # Loading
    Row(
        "mistral_hf.TFMistralForCausalLM.from_pretrained(folder, from_pt=True)(ids).logits",
        "mistral_hf.TFMistralForCausalLM.from_pretrained(folder)(ids).logits",
    ),
    Row("mistral_hf.TFMistralModel.from_config(config)", "mistral_hf.TFMistralModel(config)", equal=False),
    Row(
        "mistral_hf.TFMistralForCausalLM.from_pretrained(folder, from_flax=True)",
        "mistral_hf.TFMistralForCausalLM.from_pretrained(folder)",
        refused="In its place: nothing",
    ),
    Row(
        "mistral_hf.TFMistralForCausalLM.from_pretrained(folder, load_in_8bit=True)",
        "mistral_hf.TFMistralForCausalLM.from_pretrained(folder, dtype='bfloat16')",
        refused="In its place: .*dtype='bfloat16'",
    ),
    # Calls
    Row("model(ids)[0]", "model(ids).logits"),
    Row("model(ids, return_dict=False)[0]", "model(ids).to_tuple()[0]"),
    Row("model(ids, labels=labels)[:2]", "model(ids, labels=labels).to_tuple()[:2]"),
    Row("model([ids, mask]).logits", "model(ids, attention_mask=mask).logits"),
    Row("model((prompts, mask), training=False).logits", "model(prompts, attention_mask=mask).logits"),
    Row(f"model({_INPUTS}).logits", "model(input_ids=ids, attention_mask=mask).logits"),
    Row(f"model.call({_INPUTS}).logits", "model(ids, attention_mask=mask).logits"),
    Row("model(tokens).logits", "model(**tokens).logits"),
    Row("model(ids.tolist()).logits", "model(ids).logits"),
    Row(
        "keras.Model(symbols, model(symbols)[0])([ids, mask])",
        "model(ids, attention_mask=mask).logits",
    ),
    Row("model(ids, output_hidden_states=True)[-1][-1]", "model(ids, output_hidden_states=True).hidden_states[-1]"),
    Row(
        "model(ids[:, -1:], past_key_values=((model(ids)[0], model(ids)[0]),))",
        "model(ids[:, -1:], past_key_values=model(ids[:, :-1]).past_key_values)",
        refused="past_key_values is a tuple, but must be a cache",
    ),
    # Embeddings
    Row("model.get_input_embeddings().weight", "model.model.embed_tokens.weight"),
    Row("model.get_output_embeddings().weight", "model.lm_head.weight"),
    Row("model.resize_token_embeddings(120).weight.shape[0]", "model.config.vocab_size"),
    # Generation
    Row(
        "tf.function(model.generate, jit_compile=True)(prompts, max_new_tokens=3, do_sample=False)",
        "model.generate(prompts, max_new_tokens=3, do_sample=False)",
    ),
    Row(
        "tf.function(model.generate, input_signature=[tf.TensorSpec([None, None], tf.int32)])(prompts)",
        "model.generate(prompts, max_new_tokens=3)",
        refused="of known sizes.* or call generate outside of tf.function",
    ),
    Row("model.generate(inputs=ids, max_length=7)", "model.generate(ids, max_new_tokens=2)"),
    Row(
        "model.generate(**tokens, num_beams=2, max_new_tokens=3)",
        "model.generate(tokens, num_beams=2, max_new_tokens=3)",
    ),
    Row(
        "model.generate(ids, do_sample=True, max_new_tokens=3, seed=[42, 0])",
        "model.generate(ids, do_sample=True, max_new_tokens=3, seed=42)",
        refused="pass seed=42",
    ),
    Row(
        "model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, output_scores=True)",
        "model(model.generate(ids, max_new_tokens=3)).logits",
        refused=r"In its place: .*model\(tokens\)\.logits",
    ),
    # Training
    Row("model.hf_compute_loss(labels[:, 1:], model(ids).logits[:, :-1])", "model(ids, labels=labels).loss"),
    Row(
        "model.prepare_tf_dataset(dataset, batch_size=2).element_spec",
        "dataset.to_tf_dataset(2, ['input_ids', 'labels'], shuffle=True, drop_remainder=True).element_spec",
        equal=False,
    ),
    Row(
        "model.compile('sgd') or model.fit(model.prepare_tf_dataset(dataset, 2), verbose=0)",
        "model.compile('sgd') or model.fit({'input_ids': ids, 'labels': labels}, verbose=0)",
        equal=False,
    ),
    # Saving and serving
    Row("model(model.dummy_inputs).logits", "model([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]]).logits"),
    Row(
        "model.serving({'input_ids': prompts, 'attention_mask': tf.ones_like(prompts)})['logits']",
        "tf.function(model)(prompts)['logits']",
    ),
    Row("tf.saved_model.save(model, target, signatures=model.serving)", "model.export(target, verbose=False)"),
    Row(
        "model.save_pretrained(target, saved_model=True)",
        "model.save_pretrained(target) or model.export(target + '/saved_model/1', verbose=False)",
    ),
    Row(
        "model.save_pretrained(target, safe_serialization=False)",
        "model.save_pretrained(target)",
        refused="no argument 'safe_serialization'.* its files are always safetensors",
    ),
)


def markdown() -> str:
    """The table."""
    lines = ["| Transformers 4 | here | |", "|---|---|---|"]
    for row in ROWS:
        lines.append(f"| `{row.old}` | `{row.new or row.old}` | {'refused' if row.refused else 'works'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
