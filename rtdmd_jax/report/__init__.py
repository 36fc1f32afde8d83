"""What a run leaves for people to read: page, charts, image grids, model card."""
