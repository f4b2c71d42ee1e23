"""The engine's operations, each in Triton and, as its specification, in plain torch. They know nothing of models."""
