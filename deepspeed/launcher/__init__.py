"""Starting a script once per device, on one node or many, and ending it as one: the `deepspeed` command.

    runner.py       the command: flags, machines, devices  ->  a Job here, or a Plan for other nodes
    arguments.py    its flags
    hostfile.py     hostfiles and include/exclude filters                          (pure)
    variables.py    the environment for other nodes; .deepspeed_env; what logs show (pure)
    job.py          a Job, and from it each worker's command and environment       (pure)
    binding.py      cores for each rank                                            (pure)

    remote.py       a job on other nodes: starts their programs, ends them, says what happened
    starters/       pdsh, ssh, Open MPI, MPICH and its family, Slurm: one class each
    coordinator.py  who takes part, who failed first, when all has ended
    control.py      the connection between the coordinator and its members
    agent.py        a member's side: join, wait, run
    launch.py       a node's member; `python -m deepspeed.launcher.launch`
    launcher_helper.py  a rank's, under MPI and Slurm
    elastic.py      a node's part of an elastic job: torchrun's agent; tether.py: its ranks end with it

    supervise.py    the worker processes: start, pass output on, stop
    failure.py      what went wrong, who is to blame, the words for it             (pure)
    outlet.py       writing without waiting for the reader
    bench.py        ds_bench; ds_ssh.py: ds_ssh; commands.py: `deepspeed report` and the like
    estimate.py     `deepspeed estimate`, of a run that trains or only runs

Invariant: imports no torch, but for `elastic`, a process of its own, and `bench`.
"""
