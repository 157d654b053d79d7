"""Prints the tables of `refused_or_ignored.py` as `docs/configuration.md`: python -m deepspeed.config.tables."""

from deepspeed.config.refused_or_ignored import as_markdown

if __name__ == "__main__":
    print(as_markdown(), end="")
