"""`capas compare`: what differs between results in parameters, scores and answers."""
