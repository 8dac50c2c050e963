"""How code for the last TensorFlow classes of Transformers is written here: a table, each row of which is run.

Expressions use these names: `model` (a TFMistralForCausalLM), `config`, `folder` (its checkpoint), `target` (a new
folder), `ids`, `mask` and `labels` (arrays), `tokens` (what a tokenizer returns), `prompts` (a tensor of ids),
`symbols` (two `keras.Input`), `dataset` (of the library `datasets`), and the modules `tf`, `keras` and `mistral_hf`.
"""

from typing import NamedTuple


class Form(NamedTuple):
    """A row.

    Attributes:
        old: An expression as it was written for the library's classes.
        new: How it is written now; it gives the same.
        refusal: What the error of the old form says; None if it still works.
        equal: Whether the values of both are compared, rather than their types.
    """

    old: str
    new: str
    refusal: str | None = None
    equal: bool = True


_INPUTS = '{"input_ids": ids, "attention_mask": mask}'

OLD_FORMS = (
    # Loading
    Form(
        "mistral_hf.TFMistralForCausalLM.from_pretrained(folder, from_pt=True)(ids).logits",
        "mistral_hf.TFMistralForCausalLM.from_pretrained(folder)(ids).logits",
    ),
    Form("mistral_hf.TFMistralModel.from_config(config)", "mistral_hf.TFMistralModel(config)", equal=False),
    Form(
        "mistral_hf.TFMistralForCausalLM.from_pretrained(folder, from_flax=True)",
        "mistral_hf.TFMistralForCausalLM.from_pretrained(folder)",
        refusal="no argument 'from_flax'",
    ),
    Form(
        "mistral_hf.TFMistralForCausalLM.from_pretrained(folder, load_in_8bit=True)",
        "mistral_hf.TFMistralForCausalLM.from_pretrained(folder, dtype='bfloat16')",
        refusal="no argument 'load_in_8bit'.* it takes dtype",
    ),
    # Calls
    Form("model(ids)[0]", "model(ids).logits"),
    Form("model(ids, return_dict=False)[0]", "model(ids).to_tuple()[0]"),
    Form("model(ids, labels=labels)[:2]", "model(ids, labels=labels).to_tuple()[:2]"),
    Form("model([ids, mask]).logits", "model(ids, attention_mask=mask).logits"),
    Form("model((prompts, mask), training=False).logits", "model(prompts, attention_mask=mask).logits"),
    Form(f"model({_INPUTS}).logits", "model(input_ids=ids, attention_mask=mask).logits"),
    Form(f"model.call({_INPUTS}).logits", "model(ids, attention_mask=mask).logits"),
    Form("model(tokens).logits", "model(**tokens).logits"),
    Form("model(ids.tolist()).logits", "model(ids).logits"),
    Form(
        "keras.Model(symbols, model(symbols)[0])([ids, mask])",
        "model(ids, attention_mask=mask).logits",
    ),
    Form("model(ids, output_hidden_states=True)[-1][-1]", "model(ids, output_hidden_states=True).hidden_states[-1]"),
    Form(
        "model(ids[:, -1:], past_key_values=((model(ids)[0], model(ids)[0]),))",
        "model(ids[:, -1:], past_key_values=model(ids[:, :-1]).past_key_values)",
        refusal="past_key_values is a tuple, but must be a cache",
    ),
    # Embeddings
    Form("model.get_input_embeddings().weight", "model.model.embed_tokens.weight"),
    Form("model.get_output_embeddings().weight", "model.lm_head.weight"),
    Form("model.resize_token_embeddings(120).weight.shape[0]", "model.config.vocab_size"),
    # Generation
    Form(
        "tf.function(model.generate, jit_compile=True)(prompts, max_new_tokens=3, do_sample=False)",
        "model.generate(prompts, max_new_tokens=3, do_sample=False)",
    ),
    Form(
        "tf.function(model.generate, input_signature=[tf.TensorSpec([None, None], tf.int32)])(prompts)",
        "model.generate(prompts, max_new_tokens=3)",
        refusal="of known sizes.* or call generate outside of tf.function",
    ),
    Form("model.generate(inputs=ids, max_length=7)", "model.generate(ids, max_new_tokens=2)"),
    Form(
        "model.generate(**tokens, num_beams=2, max_new_tokens=3)",
        "model.generate(tokens, num_beams=2, max_new_tokens=3)",
    ),
    Form(
        "model.generate(ids, do_sample=True, max_new_tokens=3, seed=[42, 0])",
        "model.generate(ids, do_sample=True, max_new_tokens=3, seed=42)",
        refusal="pass seed=42",
    ),
    Form(
        "model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, output_scores=True)",
        "model(model.generate(ids, max_new_tokens=3)).logits",
        refusal="no option 'output_scores'",
    ),
    # Training
    Form("model.hf_compute_loss(labels[:, 1:], model(ids).logits[:, :-1])", "model(ids, labels=labels).loss"),
    Form(
        "model.prepare_tf_dataset(dataset, batch_size=2).element_spec",
        "dataset.to_tf_dataset(2, ['input_ids', 'labels'], shuffle=True, drop_remainder=True).element_spec",
        equal=False,
    ),
    Form(
        "model.compile('sgd') or model.fit(model.prepare_tf_dataset(dataset, 2), verbose=0)",
        "model.compile('sgd') or model.fit({'input_ids': ids, 'labels': labels}, verbose=0)",
        equal=False,
    ),
    # Saving and serving
    Form("model(model.dummy_inputs).logits", "model([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]]).logits"),
    Form(
        "model.serving({'input_ids': prompts, 'attention_mask': tf.ones_like(prompts)})['logits']",
        "tf.function(model)(prompts)['logits']",
    ),
    Form("tf.saved_model.save(model, target, signatures=model.serving)", "model.export(target, verbose=False)"),
    Form(
        "model.save_pretrained(target, saved_model=True)",
        "model.save_pretrained(target) or model.export(target + '/saved_model/1', verbose=False)",
    ),
    Form(
        "model.save_pretrained(target, safe_serialization=False)",
        "model.save_pretrained(target)",
        refusal="no argument 'safe_serialization'.* its files are always safetensors",
    ),
)
