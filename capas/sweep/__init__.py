"""Sweeps: Hydra multirun over DVC experiments, from the command to the ranking and its page."""
