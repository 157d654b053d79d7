"""From the configuration to what is built: the smallest node each part needs, before there is an engine.

Left of `memory`, which predicts what an engine would build, and of `engine`, which builds it: one meaning of every key.
"""
