"""Scores of single completions, and what a set of them says: numbers and texts in, numbers out."""
