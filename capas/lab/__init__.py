"""`capas lab`: the experiments of LABS.md that no other command can make."""
