"""Checks that a run is real: before the first step, and later on demand."""
