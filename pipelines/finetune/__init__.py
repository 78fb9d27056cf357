"""Features in, trained heads out: the loop, its state, Ray Train workers, the cache."""
