"""Rewards computed from pixels on the host."""
