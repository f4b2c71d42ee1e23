"""The base model: the 4-bit policy, loading, and the embedded model."""
