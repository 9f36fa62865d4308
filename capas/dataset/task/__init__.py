"""The embedded task: requests in English and Spanish, each answered with one function call."""
