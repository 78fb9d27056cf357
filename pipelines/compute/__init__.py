"""How Ray is used: which cluster, and one pass over the shards of stored features."""
