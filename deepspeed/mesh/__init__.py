"""The only owner of process groups: which ranks share what, by named mesh dims."""

from deepspeed.mesh.mesh import Mesh, data_parallel_mesh

__all__ = ["Mesh", "data_parallel_mesh"]
