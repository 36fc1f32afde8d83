"""LoRA adapters: collections in training, files of every common kind in and out."""
