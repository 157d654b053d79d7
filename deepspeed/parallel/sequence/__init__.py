"""Sequence parallelism: each rank has a part of every sequence, and attends with a part of the heads to all of it.

heads.py            which heads each rank has
exchange.py         the all-to-all between parts of the sequence and parts of the heads
attention.py        `DistributedAttention` over any local attention
documents.py        who may see whom in whole sequences: packed samples, padding
inputs.py           what ranks tell each other of a forward's inputs
marked.py           `prepare_autosp_inputs`: whole sequences, of which a forward takes the rank's part
forward.py          the hook around a model's forward that has them do so
core.py             an attention function of Transformers over whole sequences
block.py            attention of a block of queries to a block of keys, to be joined with others
ring.py             keys and values round a ring, and Ulysses within it, where there are fewer key heads than ranks
tiled.py            what treats tokens alone, tile by tile; `TiledMLP`
logits_loss.py      logits and their loss, tile by tile; `TiledFusedLogitsLoss`
linear_loss.py      the same for a plain linear head, whose gradients are written over its logits
tile_hf.py          `tile_model`: both of these in a model of Transformers
cross_entropy.py    losses of logits whose vocabulary or sequence is in parts
fpdt.py             attention and its neighbours chunk by chunk, for Megatron-style code
vision.py           towers that see, and adapters where images join text
supported.py        layers and masks that a part of a sequence misleads, refused by name
hf.py               `UlyssesSPAttentionHF`, in the tables of Transformers
loader.py           batches of other samples on each rank, as parts of the same samples
messages.py         what an attention and a forward send, for predictions
loss.py             by what a loss is multiplied for gradients to be the whole sequence's
parallel_state.py   the groups, as a module that is an mpu
"""
