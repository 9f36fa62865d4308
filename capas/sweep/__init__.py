"""Hydra multirun over DVC experiments: each point runs in a workspace of its own that shares DVC's cache."""
