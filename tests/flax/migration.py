"""Calls as they were written for the Flax classes of Transformers 4, each with its form here; a test runs every row.

``python -m tests.flax.migration`` prints the table in Markdown. In the code, `folder` holds a checkpoint, `config` its
configuration, and `target` nothing; `model` is a `FlaxMistralForCausalLM` with the weights `params`; `ids` and
`mask` are a batch, and `key` is a random key.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """One old form.

    Attributes:
        old: An expression in the old form.
        new: The same in the form of this package; "" if it is the old one.
        refused: What the error says where the old form is refused; "" where it works.
    """

    old: str
    new: str = ""
    refused: str = ""


LM = "FlaxMistralForCausalLM"

ROWS: tuple[Row, ...] = (
    # Loading
    Row(f"{LM}.from_pretrained(folder, from_pt=True)", f"{LM}.from_pretrained(folder)"),
    Row(f"{LM}.from_pretrained(folder, dtype=jnp.float32)"),
    Row(f"{LM}.from_pretrained(folder, config=config)"),
    Row(f"{LM}.from_pretrained(folder, _do_init=False)[1]", f"{LM}.from_pretrained(folder).params"),
    Row(f"{LM}.from_pretrained(folder, input_shape=(1, 1), seed=0)", f"{LM}.from_pretrained(folder, seed=0)"),
    Row(f"{LM}.from_pretrained(folder, trust_remote_code=True)", f"{LM}.from_pretrained(folder)"),
    Row(
        f"{LM}.from_pretrained(folder, torch_dtype='bfloat16')",
        f"{LM}.from_pretrained(folder, dtype='bfloat16')",
        "In its place: dtype=",
    ),
    Row(
        f"{LM}.from_pretrained(folder, ignore_mismatched_sizes=True)", f"{LM}.from_pretrained(folder)", "with a warning"
    ),
    Row(f"{LM}.from_pretrained(folder, use_auth_token='x')", f"{LM}.from_pretrained(folder, token='x')", "token="),
    Row("transformers.FlaxMistralForCausalLM", f"mistral_hf.{LM}", "has no attribute FlaxMistralForCausalLM"),
    # Creating
    Row(f"{LM}(config)"),
    Row(f"{LM}(config, input_shape=(1, 1), seed=1)", f"{LM}(config, seed=1)"),
    Row(f"{LM}(config, (1, 1), 1, jnp.bfloat16)", f"{LM}(config, seed=1, dtype=jnp.bfloat16)"),
    Row(f"{LM}(config, _do_init=False)(ids, mask, params=params)", "model(ids, mask)"),
    Row(f"{LM}(config, _do_init=False).params", f"{LM}(config).params", "pass params= to every call"),
    Row(f"{LM}(config, _do_init=False).init_weights(key, (1, 1))", f"{LM}(config, seed=key).params"),
    Row("model.params_shape_tree['lm_head']['weight'].shape", "params['lm_head']['weight'].shape"),
    # Weights
    Row("model.to_bf16(params)", "jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), params)"),
    Row("model.to_fp16(params)", "jax.tree.map(lambda weight: weight.astype(jnp.float16), params)"),
    Row("model.to_fp32(params)", "jax.tree.map(lambda weight: weight.astype(jnp.float32), params)"),
    Row("model(ids, mask, params=flax.core.freeze(params))", "model(ids, mask, params=params)"),
    Row("params['lm_head']['kernel']", "params['lm_head']['weight'].T", "kernel"),
    # Calls
    Row("model(ids, attention_mask=mask)"),
    Row("model(ids, mask, return_dict=False)[0]", "model(ids, mask).logits"),
    Row("model(ids, mask)[0]", "model(ids, mask).logits"),
    Row("model(ids, mask)['logits']", "model(ids, mask).logits"),
    Row("model(ids, mask).to_tuple()", "(model(ids, mask).logits,)"),
    Row("model(input_ids=ids, params=params, train=False)", "model(ids)"),
    Row("model(ids, dropout_rng=key, train=True)"),
    Row("model(ids, output_hidden_states=True, output_attentions=True)[2]"),
    Row(
        "model.module.apply({'params': params}, ids, mask)",
        "model(ids, mask, params=params)",
        "In its place|params=params",
    ),
    Row("model(ids, mask, labels=ids)", "model.loss(ids, mask, ids)", "model.loss"),
    Row("model(ids, deterministic=True)", "model(ids, train=False)", "train=False"),
    Row(
        "model(ids[:, :2], past_key_values=model.init_cache(2, 8), position_ids=jnp.arange(2)[None]).logits",
        "model(ids[:, :2]).logits",
    ),
    Row("model.enable_gradient_checkpointing()", f"{LM}(config, gradient_checkpointing=True) and None"),
    # Generating
    Row("model.generate(ids, max_length=6, do_sample=False).sequences"),
    Row("model.generate(ids, prng_key=key, do_sample=True, top_k=5, max_new_tokens=3).sequences"),
    Row("model.generate(ids, attention_mask=mask, params=params, max_new_tokens=3, num_beams=2).sequences"),
    Row(
        "model.generate(ids, generation_config=GenerationConfig(max_new_tokens=3, do_sample=False)).sequences",
        "model.generate(ids, max_new_tokens=3, do_sample=False).sequences",
    ),
    Row("model.generate(ids, logits_processor=[])", "model.generate(ids)", "no option 'logits_processor'"),
    Row("model.generate(ids, max_new_tokens=3, trace=False)", "model.generate(ids, max_new_tokens=3)", "'trace'"),
    # Saving
    Row("model.save_pretrained(target)"),
    Row("model.save_pretrained(target, params=params)"),
    Row("model.save_pretrained(target, safe_serialization=True)", "model.save_pretrained(target)"),
    Row("model.save_pretrained(target, push_to_hub=True)", "model.push_to_hub('name')", "model.push_to_hub"),
)


def markdown() -> str:
    """The table."""
    lines = ["| Transformers 4 | here | |", "|---|---|---|"]
    for row in ROWS:
        lines.append(f"| `{row.old}` | `{row.new or row.old}` | {'refused' if row.refused else 'works'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
