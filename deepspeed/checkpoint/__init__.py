"""Checkpoints: tensors and JSON, published whole, loaded anywhere. See docs/checkpoint-format.md."""
