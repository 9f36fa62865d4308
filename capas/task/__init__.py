"""The embedded task and the corpus of its base model."""
