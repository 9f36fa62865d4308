"""Track runs in MLflow: the store, runs and their content, lineage, the registry, live training rows."""
