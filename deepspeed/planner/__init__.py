"""A step before it is run: what it costs, which layout of a cluster is the fastest, what a configuration wastes.

cost       seconds of a data-parallel step from measured rates                             (pure)
cluster    what there is, from JSON                                                        (pure)
shape      a model as a stack of like blocks, from two small traces
layouts    every layout, and what each needs, sends and takes                              (pure)
search     the ranked ones, their pipelines simulated                                      (pure)
traffic    ZeRO's bytes of a step, exactly: the engine's plan played
cli, page  `deepspeed plan`            doctor          `deepspeed doctor`
largest    `deepspeed max-batch`       largest_model   `deepspeed max-model`
"""
