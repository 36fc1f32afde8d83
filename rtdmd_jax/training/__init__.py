"""What a step of training is: settings, state, batches, steps, and how a run is set up."""
