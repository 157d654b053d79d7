#!/usr/bin/env python
"""Write the fp32 weights of a checkpoint in this folder: zero_to_fp32.py CHECKPOINT_DIR OUTPUT_DIR [--help]"""

from deepspeed.checkpoint.zero_to_fp32 import main

if __name__ == "__main__":
    main()
