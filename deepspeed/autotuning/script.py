"""The user's command line: where its configuration is, and the same command with another one. Pure.

Called by the autotuner. A script names its configuration as `--deepspeed_config FILE` or `--deepspeed FILE` (what follows is JSON
in a file, or base64 of JSON). Arguments of the script that say the same as a key of the configuration are changed with it:
those that the section's `arg_mappings` names, and for a script that uses the Transformers Trainer, which refuses two different
answers, its own.

Invariant: nothing that was given is changed in place; every command is a new list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.config.batch import ACCUMULATION, MICRO
from deepspeed.utils.errors import DeepSpeedError

CONFIG_FLAGS = ("--deepspeed_config", "--deepspeed", "--deepspeed-config")
TRAINER = {MICRO: "--per_device_train_batch_size", ACCUMULATION: "--gradient_accumulation_steps"}
"""The Transformers Trainer's arguments."""
_TRAINER_WORDS = ("TrainingArguments", "HfArgumentParser", "TrlParser")


@dataclass(frozen=True)
class Script:
    """A script, its arguments, and where among them the configuration stands."""

    path: str
    arguments: tuple[str, ...]
    place: int
    """Of the argument that has the configuration."""
    prefix: str = ""
    """What stands before it in the same argument, "--deepspeed="."""
    mappings: Mapping[str, str] | None = None
    """From dotted keys to flags of the script."""

    @property
    def config(self) -> str:
        """The configuration as it was given."""
        return self.arguments[self.place].removeprefix(self.prefix)

    @property
    def uses_trainer(self) -> bool:
        """Whether the script seems to use the Transformers Trainer, which fills "auto" from its own arguments."""
        if any(argument.partition("=")[0] in TRAINER.values() for argument in self.arguments):
            return True
        path = Path(self.path)
        try:
            text = path.read_text(errors="replace") if path.is_file() and path.suffix == ".py" else ""
        except OSError:
            return False
        return any(word in text for word in _TRAINER_WORDS)

    def value_of(self, key: str) -> str | None:
        """What the script's own argument for a key of the configuration says."""
        flag = (self.mappings or {}).get(key)
        for i, argument in enumerate(self.arguments):
            name, is_joined, value = argument.partition("=")
            if flag and name == flag:
                return value if is_joined else self.arguments[i + 1] if i + 1 < len(self.arguments) else None
        return None

    def with_config(self, config: str, values: Mapping[str, Any] | None = None) -> list[str]:
        """The script's arguments with another configuration, and mapped arguments that agree with `values` (dotted keys)."""
        arguments = list(self.arguments)
        arguments[self.place] = f"{self.prefix}{config}"
        for key, flag in (self.mappings or {}).items():
            if values is not None and values.get(key) is not None:
                arguments = _with_flag(arguments, flag, str(values[key]))
        return arguments


def _with_flag(arguments: Sequence[str], flag: str, value: str) -> list[str]:
    made = list(arguments)
    for i, argument in enumerate(made):
        if argument == flag and i + 1 < len(made):
            made[i + 1] = value
            return made
        if argument.startswith(f"{flag}="):
            made[i] = f"{flag}={value}"
            return made
    return [*made, flag, value]


def find_script(path: str, arguments: Sequence[str], mappings: Mapping[str, str] | None = None) -> Script:
    """The script with its configuration found. Raises DeepSpeedError where no argument names one."""
    cleaned = {key.strip(): flag.strip() for key, flag in (mappings or {}).items()}
    for i, argument in enumerate(arguments):
        name, is_joined, _ = argument.partition("=")
        if name not in CONFIG_FLAGS:
            continue
        if is_joined:
            return Script(path, tuple(arguments), i, f"{name}=", cleaned)
        if i + 1 < len(arguments) and not arguments[i + 1].startswith("--"):
            return Script(path, tuple(arguments), i + 1, "", cleaned)
    raise DeepSpeedError(
        f"--autotuning: the arguments of {path} name no DeepSpeed configuration, so there is nothing to tune.\n"
        "  Give it to the script as --deepspeed_config ds.json, or --deepspeed ds.json; the script has to take it from there."
    )
