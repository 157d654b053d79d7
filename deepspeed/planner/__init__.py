"""A step before it is run: what it costs, which layout of a cluster is the fastest, what a configuration wastes.

cost.py          seconds of a data-parallel step from measured rates               (pure)
divided.py       the same where ranks share layers, sequences, experts or depth     (pure)
cluster.py       what there is, from JSON                                          (pure)
layouts.py       every layout, and what each needs, sends and takes                (pure)
search.py        the ranked ones, their pipelines simulated                        (pure)
traffic.py       a rank's messages of a step, exactly: the engine's plan played
cli.py           `deepspeed plan`; page.py its page
doctor.py        `deepspeed doctor`; diagnosis.py what it finds; doctor_page.py its page; machine.py what ranks of this machine measure
largest.py       `deepspeed max-batch`; largest_model.py `deepspeed max-model`
"""
