"""Splitting a model over ranks beyond data parallelism. Knows the mesh and the wire, not ZeRO: they meet in a plan's dims.

expert/      mixture of experts: gates, tokens to the ranks of their experts and back
pipeline/    stages in depth: the lists of actions and who checks them
"""
