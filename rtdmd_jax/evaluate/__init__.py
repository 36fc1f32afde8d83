"""Systems drawn, scored on held-out prompts and compared, during a run and apart from it."""
