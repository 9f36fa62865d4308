"""Run the labs of LABS.md that need a command: `capas lab`."""
