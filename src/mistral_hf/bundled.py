"""The checkpoint that ships with the package."""

from pathlib import Path

# A folder in the Hugging Face format: what any from_pretrained takes, with a model card and a held-out text beside it.
BUNDLED_CHECKPOINT = Path(__file__).parent / "data" / "tiny-mistral"
