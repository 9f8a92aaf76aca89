"""The same kernels on the GPU, in Triton: ``kernels.gpu.band`` is ``kernels.band`` there.

``kernels.rows.load`` finds them by that rule. A function that stands here under the name it has on
the CPU is what runs where entries lie on a GPU; one that does not is left to torch.

Each program goes through all contributions of a block of entries in registers: one read of the
inputs, one write, no mask and no [C, D] temporary. They round as the kernels on the CPU do, so the
bits are the same: products that torch fuses with a sum are ``tl.fma``, the compiler may fuse no
others (``EXACT``), and quotients are rounded to nearest (``tl.div_rn``).
"""
