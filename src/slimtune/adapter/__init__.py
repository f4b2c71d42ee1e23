"""The LoRA adapter: its configuration, its files, and the passport that says what it belongs to."""
