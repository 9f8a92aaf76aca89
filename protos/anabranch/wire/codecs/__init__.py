"""Codecs: how the tensors of a frame become its payload, one file per family."""
