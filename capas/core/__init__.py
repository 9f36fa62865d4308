"""What every other folder uses: errors, params, the DAG, the stage runner, locks, progress, files."""
