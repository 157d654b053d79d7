"""Mixture of experts: which tokens go to which experts, on which rank those are, and what they compute.

    capacity    how many tokens an expert takes (pure)
    gate        from logits to routes: top-1, top-2, top-k, with capacities, drops and noise
    dispatch    tokens to the ranks that hold their experts, and partial sums back
    experts     what a rank computes: modules one by one, or matrices of all experts in grouped products
    layer       `MoE`, the layer of the public contract, with its residual form
    hugging_face, presets     experts of Hugging Face models, found by structure
    listed, recipe            blocks with a list of experts, and what such a block computes, found out by trying
    adapters    PEFT's low-rank factors on matrices of all experts
    attach      the layers of a model learn their ranks; their parameters are marked
    groups      optimizer groups of experts, by the contract's functions
    load        how evenly experts are used
    times       how long parts of a layer take

Stands on `mesh` and `comm`; ZeRO meets it in marks (`mesh.marks`) and roles alone.
"""
