"""Foundations of all other folders: errors, params, the DAG, the stage runner, locks, progress, files."""
