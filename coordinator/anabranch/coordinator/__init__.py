"""The coordinator: a Flower ServerApp that collects, admits, merges and publishes."""
