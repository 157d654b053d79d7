"""Weights of 8 and 4 bits in models that only run.

spec.py       how a weight is quantized; the group size that fits its width
linear.py     QuantizedWeight, and the layers that multiply with one and look rows up in one
dequantized.py   what such a weight is read as, which cannot be written
replace.py    a model's layers replaced, by rule or by name
"""
