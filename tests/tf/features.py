"""What PyTorch's model does, and where the TensorFlow port is shown to do it: a column of the table of the ports.

A cell is the id of a test in this folder, ``file::test``, or in parentheses what there is instead.
"""

CELLS: dict[str, str] = {
    "forward pass, states and attentions of every layer": (
        "test_modeling.py::test_hidden_states_and_attentions_match_pytorch"
    ),
    "padding on either side": "test_fuzz.py::test_a_random_configuration_matches_pytorch",
    "packed sequences": "test_modeling.py::test_packed_sequences_do_not_see_each_other",
    "long inputs in proportion to the window": (
        "test_attention.py::test_no_tensor_of_a_long_prompt_is_as_large_as_a_whole_mask"
    ),
    "every rotary type": "test_layers.py::test_rotary_embeddings_match_pytorch",
    "rotary types that depend on the length, while decoding": (
        "test_generation.py::test_frequencies_that_depend_on_the_length_are_those_of_the_whole_prompt"
    ),
    "activations": "test_layers.py::test_activations_match_transformers",
    "activations with weights": "(refused by name)",
    "half precision": ("test_modeling.py::test_logits_in_low_precision_are_exact_within_what_the_dtype_can_tell_apart"),
    "float32 on trained weights": "test_modeling.py::test_a_trained_checkpoint_matches_pytorch",
    "inputs_embeds": "test_modeling.py::test_embeddings_can_take_the_place_of_ids",
    "masks of 4 dimensions": "(refused by name)",
    "cache in a custom loop": "test_modeling.py::test_cached_matches_uncached",
    "loss and gradients": "test_losses.py::test_the_language_model_loss_matches_pytorch",
    "label_smoothing": "test_losses.py::test_the_language_model_loss_matches_pytorch",
    "loss_chunk_size": "test_losses.py::test_a_loss_in_chunks_returns_no_logits_and_never_holds_them",
    "a batch whose labels are all ignored": (
        "test_losses.py::test_a_loss_of_ignored_labels_only_is_zero_with_zero_gradients"
    ),
    "gradient checkpointing": "(PyTorch)",
    "sequence classification": "test_modeling.py::test_classification_matches_pytorch",
    "token classification": "test_modeling.py::test_token_classification_matches_pytorch",
    "question answering": "(PyTorch)",
    "greedy search": "test_generation.py::test_greedy_tokens_match_pytorch",
    "sampling": "test_generation.py::test_the_rules_of_sampling_match_transformers",
    "beam search": "test_generation.py::test_beam_search_matches_pytorch",
    "num_return_sequences": "test_generation.py::test_several_sequences_of_a_prompt_are_those_of_pytorch",
    "repetition_penalty": (
        "test_generation.py::test_the_repetition_penalty_matches_pytorch_and_does_not_count_padding"
    ),
    "prefill_chunk_size": "test_generation.py::test_the_size_of_chunks_can_be_chosen",
    "assisted decoding by prompt lookup": "(refused by name)",
    "streamers": "test_generation.py::test_a_streamer_receives_the_prompt_and_every_token",
    "generation within a compiled function": (
        "test_generation.py::test_generation_within_a_graph_matches_generation_outside"
    ),
    "checkpoints, bit for bit": "test_pretrained.py::test_pytorch_reads_the_same_bits_after_a_round_trip",
    "LoRA adapters of PEFT": "(PyTorch)",
    "weights in 8 bits": "(PyTorch)",
    "several devices": "test_training.py::test_two_devices_train_as_one",
    "old call forms": "test_migration.py::test_an_old_form_gives_what_the_new_one_does_or_names_it",
    "random configurations against PyTorch": "test_fuzz.py::test_a_random_configuration_matches_pytorch",
}
