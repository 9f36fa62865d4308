"""The mask pages: the first training records token by token, with what is trained marked."""
