"""Rewards behind a URL: the client, and what travels."""
