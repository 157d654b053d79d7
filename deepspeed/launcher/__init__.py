"""Starting a script once per device and ending it as one: the `deepspeed` command.

    runner.py      the command: flags, machines, devices, meeting point  ->  a Job
    hostfile.py    hostfiles and include/exclude filters                     (pure)
    binding.py     cores for each rank                                       (pure)
    job.py         a Job, and from it each worker's command and environment  (pure)
    launch.py      one node's part; `python -m deepspeed.launcher.launch`
    supervise.py   the worker processes: start, pass output on, stop, report

Invariant: imports no torch.
"""
