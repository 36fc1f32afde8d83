"""Compiles a run's programs for a TPU topology on a machine without one, and says what they cost."""
