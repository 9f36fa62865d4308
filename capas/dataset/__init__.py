"""Records from where they are: files, and data sets on the Hugging Face Hub."""
