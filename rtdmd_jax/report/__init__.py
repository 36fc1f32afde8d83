"""Results of a run for people to read: page, charts, image grids, model card."""
