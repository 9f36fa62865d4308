"""The training: trainer, checkpoints, LoRA, packing, several processes, memory, certificate."""
