"""From what a caller passes as `config` to a plain dict.

Called by `root.load_config` and by everything that needs the user's own keys. A source is a dict, the path of a JSON or
Hjson file (JSON with comments, trailing commas and unquoted keys), or URL-safe base64 of JSON text.

Invariant: the caller's dict is never changed; what comes back shares no dict and no list with it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deepspeed.utils.errors import DeepSpeedConfigError

Source = Mapping[str, Any] | str | os.PathLike[str]


class _Pairs(dict[str, Any]):
    """An object of a file, and the keys that stand in it more than once."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        self.repeated = [key for key in self if keys.count(key) > 1]


def read_config(source: Source) -> dict[str, Any]:
    """The configuration as a new dict.

    Raises DeepSpeedConfigError for a file that is missing, malformed or has a key twice, and for any other source.
    """
    if isinstance(source, Mapping):
        return _copy(source)
    if isinstance(source, os.PathLike):
        return _read_file(os.fspath(source))
    if not isinstance(source, str):
        raise DeepSpeedConfigError(
            f"the configuration is a {type(source).__name__}.\n"
            "  Give a dict, the path of a JSON file, or URL-safe base64 of JSON text."
        )
    if os.path.exists(source):
        return _read_file(source)
    decoded = _decode_base64(source)
    if decoded is None:
        shown = source if len(source) <= 200 else source[:200] + " ..."
        raise DeepSpeedConfigError(
            f'the configuration "{shown}" is neither a file nor base64 of JSON.\n'
            f"  Looked for the file {os.path.abspath(shown)}. Check the path; a relative one starts at the folder "
            "the process runs in."
        )
    return decoded


def origin_of(source: Source) -> str:
    """How errors name a source: the file, or just "the configuration"."""
    if isinstance(source, Mapping):
        return "the configuration"
    name = os.fspath(source)
    return os.path.abspath(name) if os.path.exists(name) else "the configuration"


def _copy(value: Any) -> Any:
    """A copy of the dicts and lists; what they hold (numbers, but also groups and modules) is shared."""
    if isinstance(value, Mapping):
        return {str(key): _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    return value


def _decode_base64(text: str) -> dict[str, Any] | None:
    try:
        decoded = json.loads(base64.b64decode(text, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError):
        return None
    return decoded if isinstance(decoded, dict) else None


def _read_file(path: str) -> dict[str, Any]:
    name = os.path.abspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        raise DeepSpeedConfigError(f"the configuration file {name} does not exist.\n  Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeepSpeedConfigError(
            f"the configuration file {name} cannot be read: {error}.\n  Give a readable JSON file."
        ) from error
    if not text.strip():
        raise DeepSpeedConfigError(f"the configuration file {name} is empty.\n  Write a JSON object, {{...}}.")
    data = _parse(text, name)
    if not isinstance(data, Mapping):
        raise DeepSpeedConfigError(
            f"the configuration file {name} holds a {type(data).__name__}.\n  Write a JSON object, {{...}}."
        )
    _refuse_repeated_keys(data, name)
    return _copy(data)


def _parse(text: str, name: str) -> Any:
    """JSON where it is JSON, which is fast; Hjson otherwise."""
    try:
        return json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        as_json = error
    import hjson  # only for files that need it

    try:
        return hjson.loads(text, object_pairs_hook=_Pairs)
    except hjson.HjsonDecodeError as error:
        raise DeepSpeedConfigError(
            f"the configuration file {name} is malformed.\n"
            f"  As JSON: line {as_json.lineno}, column {as_json.colno}: {as_json.msg}.\n"
            f"  As Hjson (JSON with comments): line {error.lineno}, column {error.colno}: {error.msg}."
        ) from None


def _refuse_repeated_keys(data: Any, name: str) -> None:
    repeated = list(_repeated_keys(data, ""))
    if repeated:
        raise DeepSpeedConfigError(
            f"the configuration file {name} gives keys twice: {', '.join(repeated)}.\n  Keep one of each."
        )


def _repeated_keys(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, _Pairs):
        yield from (prefix + key for key in value.repeated)
        for key, item in value.items():
            yield from _repeated_keys(item, f"{prefix}{key}.")
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _repeated_keys(item, f"{prefix}{place}.")
