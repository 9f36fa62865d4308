"""`capas compare`: results of commits, experiments, the workspace and MLflow runs, side by side."""
