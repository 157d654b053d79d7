"""Small things that only scripts written for the original ask for; nothing else of the package uses them.

    placeholder   classes that stand for what comes later, or never, and say so when they are called
    constants     names of keys and files, by the module in which the original has them
    enums         values that scripts compare with
    partitioned   a tensor cut evenly over the ranks of a group
    ranks         this rank's positions, as functions of a module that had them once
    norms         norms and clipping over lists of tensors
    tools         seeds, partitions of a list, attributes by dotted name, and other functions of a few lines
    version       what `deepspeed.git_version_info` says

`deepspeed/legacy.py` is the table of paths under which they are found.
"""
