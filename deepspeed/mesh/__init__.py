"""Which ranks share what, by named mesh dims; the only owner of process groups.

    shape    dims, roles and groups, as pure arithmetic       marks    a parameter's own dims
    mesh     the process groups of a shape                    door     a user's mpu becomes a shape
    groups   `deepspeed.utils.groups`                         script   groups that a script made by name

Which of these ranks share a bucket is a role that `zero.plan` gives it. No dim's name is spelled outside of this folder and `zero.policy`.
"""

from deepspeed.mesh.door import data_parallel_mesh
from deepspeed.mesh.mesh import Mesh, alike_everywhere, with_experts

__all__ = ["Mesh", "alike_everywhere", "data_parallel_mesh", "with_experts"]
