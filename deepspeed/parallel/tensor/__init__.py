"""Tensor parallelism: the layers of a model are cut over ranks, which compute parts of each for the same samples.

cuts.py          which indices of a dimension each rank holds; pure
refusal.py       why a model is not cut
rules.py         which layer becomes what: Transformers' styles, presets, patterns, structure; pure
heads.py         how attention's heads are shared out, also where there are fewer than ranks
choose.py        which table holds for a model
collectives.py   what layers send, forward and backward face to face
layers.py        the layers
head.py          logits that stay cut over the vocabulary, and their loss
regions.py       between layers each rank has some tokens
blocks.py        where such regions are in a model
surround.py      hooks around modules that are no layers
apply.py         cuts a model in place
adapters.py      adapters that come when layers are cut already
inputs.py        whether the ranks get the same data
by_hand.py       linear layers that scripts cut themselves
tables.py        embeddings that scripts cut themselves
whole.py         whole parameters for a while
specs.py         rules as Python objects, for scripts
requested.py     what `tp_model_init` was told
"""
