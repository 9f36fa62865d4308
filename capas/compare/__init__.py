"""`capas compare`: show how results differ in parameters, scores and answers."""
