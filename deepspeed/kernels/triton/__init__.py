"""Triton kernels for GPUs. Importing a module of this folder needs the `triton` package, which torch's GPU builds bring.

    lists.py       many tensors as one launch: a table of addresses, cut into chunks
    adam.py  lamb.py  lion.py        one pass over parameters, gradients and states of any mix of dtypes
    quantize.py    group-wise int8 and int4, both ways
    products.py    few rows times a weight of 8 or 4 bits
    signs.py       one bit per element with error feedback

Products and sums are not fused (`enable_fp_fusion=False`): these kernels wait for memory, and numbers stay those of torch.
They run in Triton's interpreter (TRITON_INTERPRET=1) on the CPU, which is how they are tested without a GPU.
"""
