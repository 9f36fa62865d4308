"""Records from files, the Hub or the embedded task: shapes, flaws, duplicates, splits."""
