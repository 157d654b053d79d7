"""The conductor: builds everything under `deepspeed.initialize` and runs the training step."""
