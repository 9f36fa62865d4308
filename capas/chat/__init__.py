"""Conversations as token ids: templates, scaffolds, masks."""
