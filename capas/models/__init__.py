"""Handle models in memory and on disk: hardware and kernels, loading, architectures, weights, adapters."""
