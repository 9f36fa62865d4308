"""Conversations as token ids: tokenizer files, chat templates, masks, splits, and their audit."""
