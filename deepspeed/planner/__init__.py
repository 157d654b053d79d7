"""A step before it is run: what it costs, which layout of a cluster is the fastest, what a configuration wastes."""
