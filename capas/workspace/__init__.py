"""The user's repository kept whole: experiments put back, merges, updates, rebuilds, what is due."""
