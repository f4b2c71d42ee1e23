"""A run's folder: its files, provenance, metrics and report. Imports no torch."""
