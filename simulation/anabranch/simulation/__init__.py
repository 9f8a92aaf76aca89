"""Federations on one machine: scenarios, data partitions, engines, baselines, reports."""
