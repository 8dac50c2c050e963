"""What PyTorch's model does, and where each port is shown to do it: one table, for a test and for the docs.

``python -m tests.ports_features`` prints it in Markdown. A port's cell is the id of a test in its folder,
``file::test``, or in parentheses what it has instead. A framework is a column: add its name to `PORTS`, and its cell to
every row.
"""

from __future__ import annotations

PORTS = ("flax",)

FEATURES: dict[str, dict[str, str]] = {
    "forward pass, states and attentions of every layer": {
        "flax": "test_modeling.py::test_states_and_attentions_of_every_layer_match_pytorch"
    },
    "padding on either side": {"flax": "test_fuzz.py::test_a_random_model_computes_what_pytorch_computes"},
    "packed sequences": {"flax": "test_packing.py::test_packed_sequences_have_the_logits_of_each_alone_and_of_pytorch"},
    "long inputs in proportion to the window": {"flax": "test_modeling.py::test_no_mask_of_the_whole_input_is_built"},
    "every rotary type": {"flax": "test_modeling.py::test_rotary_embeddings_match_pytorch"},
    "rotary types that depend on the length, while decoding": {
        "flax": "test_modeling.py::test_frequencies_that_depend_on_the_length_follow_it_in_generation"
    },
    "activations": {"flax": "test_modeling.py::test_activations_match_transformers"},
    "activations with weights": {"flax": "(refused by name)"},
    "half precision": {"flax": "test_modeling.py::test_half_precision_is_as_exact_as_pytorch"},
    "float32 on trained weights": {
        "flax": "test_generation.py::test_trained_weights_give_the_logits_and_tokens_of_pytorch"
    },
    "inputs_embeds": {"flax": "(input_ids only)"},
    "cache in a custom loop": {"flax": "test_modeling.py::test_a_prompt_read_in_chunks_has_the_logits_of_one_pass"},
    "loss and gradients": {"flax": "test_modeling.py::test_the_loss_and_its_gradients_match_pytorch"},
    "label_smoothing": {"flax": "test_losses.py::test_label_smoothing_of_the_configuration_matches_pytorch"},
    "loss_chunk_size": {
        "flax": "test_losses.py::test_the_chunk_of_the_configuration_or_of_the_call_changes_only_memory"
    },
    "a batch whose labels are all ignored": {
        "flax": "test_losses.py::test_a_batch_without_a_label_gives_zero_and_a_warning"
    },
    "gradient checkpointing": {
        "flax": "test_modeling.py::test_checkpointed_and_scanned_layers_have_the_same_gradients"
    },
    "sequence classification": {
        "flax": "test_classification.py::test_logits_are_those_of_pytorch_with_padding_on_either_side"
    },
    "token classification": {"flax": "(PyTorch)"},
    "question answering": {"flax": "(PyTorch)"},
    "greedy search": {"flax": "test_generation.py::test_greedy_tokens_match_the_oracle"},
    "sampling": {"flax": "test_generation.py::test_samples_have_the_distribution_of_transformers"},
    "beam search": {"flax": "test_generation.py::test_beam_search_and_repetition_penalty_match_pytorch"},
    "num_return_sequences": {"flax": "test_generation.py::test_the_best_beams_are_returned_in_the_order_of_pytorch"},
    "repetition_penalty": {"flax": "test_generation.py::test_beam_search_and_repetition_penalty_match_pytorch"},
    "prefill_chunk_size": {"flax": "test_generation.py::test_a_prompt_read_in_chunks_gives_the_same_tokens"},
    "assisted decoding by prompt lookup": {
        "flax": "test_prompt_lookup.py::test_greedy_tokens_are_those_of_plain_generation_and_of_pytorch"
    },
    "streamers": {"flax": "test_generation.py::test_a_streamer_receives_every_token"},
    "checkpoints, bit for bit": {"flax": "test_pretrained.py::test_a_round_trip_from_pytorch_changes_no_bit"},
    "LoRA adapters of PEFT": {
        "flax": "test_lora.py::test_training_changes_the_matrices_only_and_peft_loads_the_result"
    },
    "weights in 8 bits": {"flax": "test_weights.py::test_a_quantized_model_computes_what_its_weights_say"},
    "several devices": {"flax": "test_environment.py::test_eight_devices_compute_what_one_computes"},
    "old call forms": {"flax": "test_migration.py::test_an_old_form_works_or_names_the_new_one"},
    "random configurations against PyTorch": {
        "flax": "test_fuzz.py::test_a_random_model_computes_what_pytorch_computes"
    },
}


def markdown() -> str:
    """The table; a cell says yes, or what there is instead."""
    lines = [f"| | {' | '.join(PORTS)} |", f"|---|{'---|' * len(PORTS)}"]
    for feature, cells in FEATURES.items():
        shown = (cells[port].strip("()") if cells[port].startswith("(") else "yes" for port in PORTS)
        lines.append(f"| {feature} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
