"""Models in the folders of Hugging Face's `transformers`: written from runs, and trained on."""
