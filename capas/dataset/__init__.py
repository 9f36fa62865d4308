"""Records from files, URLs and the Hub: read, recognised, checked, split, mixed."""
