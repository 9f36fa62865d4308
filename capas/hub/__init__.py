"""Where models and data come from: the Hugging Face Hub, local folders, the embedded files."""
