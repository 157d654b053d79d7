"""Classes that stand for what this version does not have, so that scripts which only import them run.

Made by the lazy tables (`utils.lazy`) for targets that begin with "~". A placeholder can be subclassed, used in
`isinstance` and in annotations, pickled by name; calling it, or a subclass, raises.

Invariant: nothing happens at import; the error names the class, the feature, and what to do.
"""

from __future__ import annotations

from typing import Any, ClassVar

from deepspeed.utils.errors import NotAvailableError

INTERNAL = "internal"
"""The feature of a placeholder for a part of the original's inside, which no later version will have."""

GONE = "gone: "
"""How the feature of a placeholder begins for a name that the original has lost too; the cure follows."""


class Placeholder:
    """Base of every placeholder. Not in the original."""

    _feature: ClassVar[str]
    _path: ClassVar[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls._feature == INTERNAL:
            raise NotAvailableError(
                f"{cls._path} is a part of the original's inside and has no counterpart here.\n"
                "  Use the public names: deepspeed.initialize, deepspeed.zero, deepspeed.utils.safe_*."
            )
        if cls._feature.startswith(GONE):
            raise NotAvailableError(
                f"{cls._path} is in no recent version of the original and has no counterpart here.\n"
                f"  {cls._feature.removeprefix(GONE)}"
            )
        raise NotAvailableError(
            f"{cls._path} is not available yet: {cls._feature}.\n  Importing it is fine; train without it."
        )


def placeholder(module: str, name: str, feature: str) -> type[Placeholder]:
    """The class `name` of `module`, which stands for a feature."""
    text = f"Stands for {module}.{name}, which is not available: {feature}."
    own = {
        "_feature": feature,
        "_path": f"{module}.{name}",
        "__module__": module,
        "__qualname__": name,
        "__doc__": text,
    }
    return type(name, (Placeholder,), own)
