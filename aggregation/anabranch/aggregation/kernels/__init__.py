"""The entry-wise methods fused for the CPU: a block of entries comes from memory once per merge.

A method names its kernel as text, ``module:function``, so that importing the library loads no
numba. The pure torch function stays what defines the method; a kernel takes its place where
``rows.worthwhile`` says so.
"""
