"""A fleet in, hosts converged."""
