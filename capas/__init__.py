"""capas: what the stages of the pipeline share. One noun per module; the stages tell the story."""
