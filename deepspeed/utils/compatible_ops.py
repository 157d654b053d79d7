"""`deepspeed.ops.__compatible_ops__`: which native operations of the original a script may count on, by their names there.

Scripts and tests ask before they use one. True where this package does the same work on every machine, compiled or not.
"""

COMPATIBLE: dict[str, bool] = {
    **dict.fromkeys("async_io cpu_adam cpu_adagrad cpu_lion fused_adam fused_lamb fused_lion utils".split(), True),
    **dict.fromkeys("gds sparse_attn spatial_inference transformer_inference inference_core_ops".split(), False),
}
