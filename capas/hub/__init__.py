"""Get models and data: from the Hugging Face Hub, local folders and the embedded files."""
