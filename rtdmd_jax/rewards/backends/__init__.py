"""PyTorch models behind rewards, for the machine that serves them; torch is imported on use."""
