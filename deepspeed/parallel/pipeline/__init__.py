"""Pipelines: a model cut in depth, run from a list of actions that can be printed.

    actions.py      the lists: printed, read from CSV; `Script` writes them from phrases
    schedules/      the named lists, a file each
    check.py        is a list complete, does it end, how long, who waits, what is alive: a simulation
    generate.py     a list from measured times and a memory limit
    partition.py    which layers a stage gets
    topology.py     ranks as points of a box of axes, as scripts name them
    grid.py         its process groups, as an mpu

    layers.py       layers as descriptions
    cut.py          the names of `partition_method`
    profile.py      what layers take, for two of them; saved.py: what autograd keeps
    module.py       the model: a rank builds the layers of its stages
    tied.py         parameters that several stages have
    hf.py           a model of Hugging Face as such a module
    hf_parts.py     its layers; hf_folder.py: the same, read from a folder where they belong
    executor.py     carries a list out
    mail.py         values on their way between ranks
    form.py         what a hop carries, in few bytes
    late_weight_gradients.py   weight gradients later
    slots.py        the contract's schedules, for scripts
    instructions.py what they are made of

Actions, schedules, check, generate, partition, topology, form, slots and instructions are pure: they know no process.
"""
