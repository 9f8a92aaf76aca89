"""Secure aggregation: a coordinator learns the sum of a group's vectors, and no single one.

After Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS
2017), with the round of consistency that holds against a coordinator that lies. ``member`` is what
a client does, ``recovery`` what the coordinator does; the rest is what both need.
"""
