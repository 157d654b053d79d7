"""Environment variables for remote nodes: which are sent, what a `.deepspeed_env` file may say, what logs show of them.

Called by `remote` and the starters, which quote the values or hand them over without a shell; here they are data. Pure
but for reading the files.

    caller's variables with known prefixes  <  ~/.deepspeed_env  <  ./.deepspeed_env, if asked for

    file := (comment | NAME "=" VALUE)*       one per line; blanks around and one pair of quotes are taken off

Note [The file in the current directory]
    It may have come with somebody else's repository, and a variable such as LD_PRELOAD or PYTHONSTARTUP is as good as a
    program. So it is read only when asked for, by DS_ENV_FILE or --env_file. Accelerate, however, writes its own
    variables to that file before it starts us and expects them to travel. Hence one exception, which cannot bring in
    anything new: a line whose value is what the caller's environment has already selects that variable for sending.

Invariant: a name is an identifier; a value is never interpreted, expanded or executed here or on the other side.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from deepspeed.accelerator.platforms import Platform
from deepspeed.utils.errors import DeepSpeedError

logger = logging.getLogger("DeepSpeed.launcher")
FILE_NAME = ".deepspeed_env"
PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX", "DS_", "DEEPSPEED_", "GLOO_", "TORCH_NCCL", "TORCH_DISTRIBUTED")
"""The caller's variables that go along, beside those of the accelerator."""
_NEVER = ("DS_ENV_FILE", "DS_CONTROL_TOKEN")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH|COOKIE", re.I)
_USERINFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def parse_env_file(text: str, name: str) -> Iterator[tuple[str, str]]:
    """The (name, value) pairs of a file, in order. Raises DeepSpeedError, naming file and line, for what is none."""
    for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
        if not line or line.startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not _NAME.fullmatch(key):
            raise DeepSpeedError(
                f'{name}, line {number}: {redacted(line)!r} is no variable.\n  Write "NAME=VALUE"; values are taken '
                "literally. NAME has letters, digits and underscores."
            )
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        if "\0" in value:
            raise DeepSpeedError(f"{name}, line {number}: the value of {key} has a null byte.\n  Remove it.")
        yield key, value


def exported(
    environ: Mapping[str, str], platform: Platform | None, cwd: Path, home: Path, asked_for: str | None = None
) -> dict[str, str]:
    """The variables for remote nodes. `asked_for` is --env_file, else DS_ENV_FILE counts."""
    prefixes = (*PREFIXES, *(platform.export_prefixes if platform else ()))
    chosen = {k: v for k, v in environ.items() if k.startswith(prefixes) and k not in _NEVER and _NAME.fullmatch(k)}
    if "AISC_JOB_NAME" in environ:
        for name in ("NCCL_IB_HCA", "UCX_NET_DEVICES"):
            chosen.pop(name, None)
    chosen["PYTHONPATH"] = os.pathsep.join(filter(None, [str(cwd), environ.get("PYTHONPATH")]))
    asked = asked_for or environ.get("DS_ENV_FILE")
    is_here = asked is not None or cwd.resolve() == home.resolve()
    places = [home / (asked or FILE_NAME), *([cwd / (asked or FILE_NAME)] if is_here else [])]
    found = [path for path in dict.fromkeys(path.resolve() for path in places) if path.is_file()]
    if asked_for and not found:
        raise DeepSpeedError(f"--env_file {asked_for} does not exist, neither here nor in {home}.")
    for path in found:
        chosen |= dict(parse_env_file(_text(path), str(path)))
    if not is_here and (cwd / FILE_NAME).is_file():
        chosen |= _selected(cwd / FILE_NAME, environ, chosen)
    return chosen


def _selected(path: Path, environ: Mapping[str, str], chosen: Mapping[str, str]) -> dict[str, str]:
    """What a file that was not asked for may do: see Note [The file in the current directory]."""
    pairs = list(parse_env_file(_text(path), str(path)))
    known = {key: value for key, value in pairs if environ.get(key) == value}
    new = sorted({key for key, value in pairs if key not in known and chosen.get(key) != value})
    if new:
        logger.warning(
            "%s is not used: %s. Set DS_ENV_FILE=%s, or give --env_file, if you trust it",
            path,
            ", ".join(new),
            FILE_NAME,
        )
    return known


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DeepSpeedError(f"{path} cannot be read: {error}.") from None


def shown(name: str, value: str) -> str:
    """ "NAME=value" for logs, without the value of a secret and without passwords in addresses."""
    return f"{name}={'***' if _SECRET.search(name) else _USERINFO.sub('***', value)}"


def redacted(text: str) -> str:
    """A line that may be an assignment, as `shown` writes it."""
    name, equals, value = text.partition("=")
    return shown(name, value) if equals else _USERINFO.sub("***", text)


def shown_command(argv: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """A command for logs: every secret value of `variables` in it replaced."""
    secrets = [value for name, value in variables.items() if value and _SECRET.search(name)]
    return [_USERINFO.sub("***", _without(word, secrets)) for word in argv]


def _without(text: str, secrets: Iterable[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text
