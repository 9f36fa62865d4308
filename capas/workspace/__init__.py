"""Keep the user's repository whole: restoring experiments, merges, updates, rebuilds, stages that are due."""
