"""Side-by-side measurements of mistral_hf and the library's own Mistral."""
