"""From the configuration to what is built: the smallest node each part needs, before there is an engine.

Left of `memory`, which predicts what an engine would build, and of `engine`, which builds it: one meaning of every key.

    assemble    the steps by which an engine is built: policy, mesh, groups, optimizer, reducer, limits
    exchanges   by which exchanges parameters and gradients move
    tensor      what it says about a model's layers
    sequence    how many ranks share a sequence, and what their losses are
"""
