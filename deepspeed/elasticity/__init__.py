"""Training on a changing number of GPUs: which batch sizes allow it, and the agent that starts ranks again.

    compute.py   the batch of a configuration, for users and schedulers; the arithmetic is `config.elastic`
    agent.py     torchrun's agent, told of lost nodes by the launcher
    command.py   the `ds_elastic` command

Invariant: the batch size of a run depends on the configuration alone (version 0.1) or on it and the number of nodes
(version 0.2), so that every rank and every scheduler finds the same.
"""

from deepspeed.utils.lazy import invert as _invert
from deepspeed.utils.lazy import lazy_exports as _lazy_exports

__getattr__, __dir__ = _lazy_exports(
    __name__,
    _invert(
        {
            "deepspeed.elasticity.compute": "compute_elastic_config elasticity_enabled ensure_immutable_elastic_config "
            "get_valid_gpus get_compatible_gpus",
            "deepspeed.elasticity.agent": "DSElasticAgent",
            "deepspeed.utils.errors": "ElasticityError ElasticityConfigError ElasticityIncompatibleWorldSize",
        }
    ),
)
