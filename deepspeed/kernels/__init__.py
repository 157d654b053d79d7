"""Operations that have more than one implementation: on torch, compiled for the processor, and in Triton.

    table.py                 which operation has which implementation, and which of them a device takes
    native.py                the library compiled from csrc/, loaded at first use; why there is none
    native_optimizers.py     its loops over lists of tensors in main memory
    native_quantize.py       its loops of quantisation and of signs
    native_sums.py           its sums of what ranks sent each other
    native_watch.py          its look at many tensors: are they where and as they were?
    native_products.py       its products of few rows with a weight of 32, 16, 8 or 4 bits
    native_attention.py      its attention of one new token over a cache of fp32, bf16 or int8
    native_decode.py         its step of one token through all layers of a decoder
    grouped.py               rows in groups, each times a matrix of its own, by two ways that a trial chooses from
    expert_mlp.py            two products per expert with an activation between, one expert after the other in the cache
    native_experts.py        the same with a gated MLP on one thread, compiled
    onednn.py                products of fp32 matrices by oneDNN where torch's BLAS is slower: experts'
    pages.py                 large results in pages of 2 MiB
    reused_memory.py         memory of large results that is used again, once nothing is in it
    reference/               plain torch: the fallback everywhere and the oracle of the tests
    triton/                  the same in Triton, for GPUs; one pass over memory, few launches

Callers ask `table.pick` with an operation and a device; what it gives has the reference's signature or, for the
optimizers' loops, returns False where it does not take the tensors it is given.
"""
