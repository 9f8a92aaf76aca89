"""Differential privacy of clients towards whoever sees the adapters: clip, noise, account."""
