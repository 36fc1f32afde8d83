"""Rewards computed on the device, each with its gradient by the image."""
