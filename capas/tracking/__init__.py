"""MLflow: the store, runs and their content, lineage, the registry, rows of a running training."""
