"""The fast engine: one model instance made fast, reversibly."""
