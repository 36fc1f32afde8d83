"""The training step: settings, state, batches, steps, and how a run is set up."""
