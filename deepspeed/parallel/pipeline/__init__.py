"""Pipelines: a model cut in depth, run from a list of actions that can be printed.

    actions.py      the lists: printed, read from CSV; `Script` writes them from phrases
    schedules/      the named lists, a file each
    check.py        is a list complete, does it end, how long, who waits, what is alive: a simulation
    generate.py     a list from measured times and a memory limit
    partition.py    which layers a stage gets
    topology.py     ranks as points of a box of axes, as scripts name them
    grid.py         its process groups, as an mpu

All but the grid is pure: it knows no tensor and no process.
"""
