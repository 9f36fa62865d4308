"""Write the mask pages: the first training records token by token, with trained tokens marked."""
