"""What PyTorch's model does, and where each port is shown to do it: one table, for a test and for the docs.

``python -m tests.ports_features`` prints it in Markdown. A port's cell is the id of a test in its folder,
``file::test``, or in parentheses what it has instead. A framework is a column: add its name to `PORTS`, and its cell to
every row.
"""

from __future__ import annotations

PORTS = ("flax", "tf")

FEATURES: dict[str, dict[str, str]] = {
    "forward pass, states and attentions of every layer": {
        "flax": "test_modeling.py::test_states_and_attentions_of_every_layer_match_pytorch",
        "tf": "test_modeling.py::test_hidden_states_and_attentions_match_pytorch",
    },
    "padding on either side": {
        "flax": "test_fuzz.py::test_a_random_model_computes_what_pytorch_computes",
        "tf": "test_fuzz.py::test_a_random_configuration_matches_pytorch",
    },
    "packed sequences": {
        "flax": "test_packing.py::test_packed_sequences_have_the_logits_of_each_alone_and_of_pytorch",
        "tf": "test_modeling.py::test_packed_sequences_do_not_see_each_other",
    },
    "long inputs in proportion to the window": {
        "flax": "test_modeling.py::test_no_mask_of_the_whole_input_is_built",
        "tf": "test_attention.py::test_no_tensor_of_a_long_prompt_is_as_large_as_a_whole_mask",
    },
    "every rotary type": {
        "flax": "test_modeling.py::test_rotary_embeddings_match_pytorch",
        "tf": "test_layers.py::test_rotary_embeddings_match_pytorch",
    },
    "rotary types that depend on the length, while decoding": {
        "flax": "test_modeling.py::test_frequencies_that_depend_on_the_length_follow_it_in_generation",
        "tf": "test_generation.py::test_frequencies_that_depend_on_the_length_are_those_of_the_whole_prompt",
    },
    "activations": {
        "flax": "test_modeling.py::test_activations_match_transformers",
        "tf": "test_layers.py::test_activations_match_transformers",
    },
    "activations with weights": {
        "flax": "(refused by name)",
        "tf": "(refused by name)",
    },
    "half precision": {
        "flax": "test_modeling.py::test_half_precision_is_as_exact_as_pytorch",
        "tf": "test_modeling.py::test_logits_in_low_precision_are_exact_within_what_the_dtype_can_tell_apart",
    },
    "float32 on trained weights": {
        "flax": "test_generation.py::test_trained_weights_give_the_logits_and_tokens_of_pytorch",
        "tf": "test_modeling.py::test_a_trained_checkpoint_matches_pytorch",
    },
    "inputs_embeds": {
        "flax": "(input_ids only)",
        "tf": "test_modeling.py::test_embeddings_can_take_the_place_of_ids",
    },
    "masks of 4 dimensions": {
        "flax": "(refused by name)",
        "tf": "(refused by name)",
    },
    "cache in a custom loop": {
        "flax": "test_modeling.py::test_a_prompt_read_in_chunks_has_the_logits_of_one_pass",
        "tf": "test_modeling.py::test_cached_matches_uncached",
    },
    "loss and gradients": {
        "flax": "test_modeling.py::test_the_loss_and_its_gradients_match_pytorch",
        "tf": "test_losses.py::test_the_language_model_loss_matches_pytorch",
    },
    "label_smoothing": {
        "flax": "test_losses.py::test_label_smoothing_of_the_configuration_matches_pytorch",
        "tf": "test_losses.py::test_the_language_model_loss_matches_pytorch",
    },
    "loss_chunk_size": {
        "flax": "test_losses.py::test_the_chunk_of_the_configuration_or_of_the_call_changes_only_memory",
        "tf": "test_losses.py::test_a_loss_in_chunks_returns_no_logits_and_never_holds_them",
    },
    "a batch whose labels are all ignored": {
        "flax": "test_losses.py::test_a_batch_without_a_label_gives_zero_and_a_warning",
        "tf": "test_losses.py::test_a_loss_of_ignored_labels_only_is_zero_with_zero_gradients",
    },
    "gradient checkpointing": {
        "flax": "test_modeling.py::test_checkpointed_and_scanned_layers_have_the_same_gradients",
        "tf": "(PyTorch)",
    },
    "sequence classification": {
        "flax": "test_classification.py::test_logits_are_those_of_pytorch_with_padding_on_either_side",
        "tf": "test_modeling.py::test_classification_matches_pytorch",
    },
    "token classification": {
        "flax": "(PyTorch)",
        "tf": "test_modeling.py::test_token_classification_matches_pytorch",
    },
    "question answering": {
        "flax": "(PyTorch)",
        "tf": "(PyTorch)",
    },
    "greedy search": {
        "flax": "test_generation.py::test_greedy_tokens_match_the_oracle",
        "tf": "test_generation.py::test_greedy_tokens_match_pytorch",
    },
    "sampling": {
        "flax": "test_generation.py::test_samples_have_the_distribution_of_transformers",
        "tf": "test_generation.py::test_the_rules_of_sampling_match_transformers",
    },
    "beam search": {
        "flax": "test_generation.py::test_beam_search_and_repetition_penalty_match_pytorch",
        "tf": "test_generation.py::test_beam_search_matches_pytorch",
    },
    "num_return_sequences": {
        "flax": "test_generation.py::test_the_best_beams_are_returned_in_the_order_of_pytorch",
        "tf": "test_generation.py::test_several_sequences_of_a_prompt_are_those_of_pytorch",
    },
    "repetition_penalty": {
        "flax": "test_generation.py::test_beam_search_and_repetition_penalty_match_pytorch",
        "tf": "test_generation.py::test_the_repetition_penalty_matches_pytorch_and_does_not_count_padding",
    },
    "prefill_chunk_size": {
        "flax": "test_generation.py::test_a_prompt_read_in_chunks_gives_the_same_tokens",
        "tf": "test_generation.py::test_the_size_of_chunks_can_be_chosen",
    },
    "assisted decoding by prompt lookup": {
        "flax": "test_prompt_lookup.py::test_greedy_tokens_are_those_of_plain_generation_and_of_pytorch",
        "tf": "(refused by name)",
    },
    "streamers": {
        "flax": "test_generation.py::test_a_streamer_receives_every_token",
        "tf": "test_generation.py::test_a_streamer_receives_the_prompt_and_every_token",
    },
    "generation within a compiled function": {
        "flax": "(compiled by itself)",
        "tf": "test_generation.py::test_generation_within_a_graph_matches_generation_outside",
    },
    "checkpoints, bit for bit": {
        "flax": "test_pretrained.py::test_a_round_trip_from_pytorch_changes_no_bit",
        "tf": "test_pretrained.py::test_pytorch_reads_the_same_bits_after_a_round_trip",
    },
    "LoRA adapters of PEFT": {
        "flax": "test_lora.py::test_training_changes_the_matrices_only_and_peft_loads_the_result",
        "tf": "(PyTorch)",
    },
    "weights in 8 bits": {
        "flax": "test_weights.py::test_a_quantized_model_computes_what_its_weights_say",
        "tf": "(PyTorch)",
    },
    "several devices": {
        "flax": "test_environment.py::test_eight_devices_compute_what_one_computes",
        "tf": "test_training.py::test_two_devices_train_as_one",
    },
    "old call forms": {
        "flax": "test_migration.py::test_an_old_form_works_or_names_the_new_one",
        "tf": "test_migration.py::test_an_old_form_gives_what_the_new_one_does_or_names_it",
    },
    "random configurations against PyTorch": {
        "flax": "test_fuzz.py::test_a_random_model_computes_what_pytorch_computes",
        "tf": "test_fuzz.py::test_a_random_configuration_matches_pytorch",
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
