"""`ds_elastic -c config.json [-w N]`: the batch of an elastic configuration and the GPU counts that can train it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from deepspeed.elasticity.compute import SECTION, compute_elastic_config, read_section


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="ds_elastic", description=__doc__)
    parser.add_argument("-c", "--config", type=Path, required=True, help="the configuration (JSON)")
    parser.add_argument("-w", "--world-size", type=int, default=0, help="the micro-batch for so many GPUs, too")
    args = parser.parse_args(arguments)
    try:
        if args.world_size < 0:
            raise ValueError(
                f"--world-size {args.world_size} is no number of GPUs.\n  Give 1 or more, or leave it out."
            )
        config = json.loads(args.config.read_text())
        section = read_section(config)
        # Version 0.2 speaks about a given number of GPUs only; without one, the fewest stand for it.
        world_size = args.world_size or (section.num_gpus_per_node if section.version != 0.1 else 0)
        batch, valid, *micro = compute_elastic_config(config, sys.modules["deepspeed"].__version__, world_size)
    except json.JSONDecodeError as error:
        print(f"ds_elastic: {args.config} is not JSON: {error}.", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"ds_elastic: {args.config} cannot be read: {error.strerror}.", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"ds_elastic: {error}", file=sys.stderr)
        return 1
    print(f"{SECTION}: {json.dumps(config[SECTION], indent=4, sort_keys=True)}")
    print(f"final_batch_size .... {batch}")
    print(f"valid_gpus .......... {list(valid)}")
    if args.world_size > 0:
        print(f"micro_batch_size .... {micro[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
