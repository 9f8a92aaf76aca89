"""Secure aggregation on the coordinator's side: what is asked for, and a round of it."""
