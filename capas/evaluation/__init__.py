"""What a model answers and how good that is: generation, metrics, intervals, gate, prompts."""
