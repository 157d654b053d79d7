"""`ds_to_universal`: kept for scripts. Checkpoints here load into any world size and ZeRO stage as they are, so there is
nothing to convert: the command checks the input and puts the checkpoint under the output's name.
"""

from __future__ import annotations

import argparse
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from deepspeed.checkpoint.files import replace_durably
from deepspeed.checkpoint.find import open_checkpoint
from deepspeed.utils.errors import CheckpointError

EXPLANATION = (
    "Nothing had to be converted: load_checkpoint reads this checkpoint with any number of ranks, any ZeRO stage and any "
    "precision. This step can be dropped from your scripts."
)


def convert(input_folder: str | Path, output_folder: str | Path) -> None:
    """Put a tag's folder under another name (hard links where possible), and name it in `latest_universal` beside it."""
    source, target = Path(input_folder), Path(output_folder)
    open_checkpoint(source)
    if target.exists():
        raise CheckpointError(f"the output folder {target} exists already.")
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, aside, copy_function=_link)
    os.rename(aside, target)
    replace_durably(target.parent / "latest_universal", target.name.encode())


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def main(args: Any = None) -> None:
    """The command; `args` may be a namespace, as scripts that call it from Python pass."""
    parser = argparse.ArgumentParser(prog="ds_to_universal", description=f"Kept for scripts. {EXPLANATION}")
    parser.add_argument("--input_folder", required=True, help="a tag's folder, e.g. checkpoints/global_step10")
    parser.add_argument("--output_folder", required=True, help="where the checkpoint is put under another name")
    parser.add_argument("--num_extract_workers", type=int, default=4, help="no effect")
    parser.add_argument("--num_merge_workers", type=int, default=2, help="no effect")
    for name in ("keep_temp_folder", "no_strict", "inject_missing_state"):
        parser.add_argument(f"--{name}", action="store_true", help="no effect")
    options = args if args is not None and hasattr(args, "input_folder") else parser.parse_args(args)
    try:
        convert(options.input_folder, options.output_folder)
    except (ValueError, OSError) as error:
        parser.exit(1, f"ds_to_universal: {error}\n")
    print(EXPLANATION)


if __name__ == "__main__":
    main()
