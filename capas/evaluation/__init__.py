"""Answers of a model and their scores: generation, metrics, intervals, gate, prompts."""
