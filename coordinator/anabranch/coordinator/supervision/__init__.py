"""Flower's processes of one federation: started, watched, and started again when they die."""
