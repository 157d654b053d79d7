"""Prints the tables of `availability.py` as `docs/configuration.md`: python -m deepspeed.config.tables."""

from deepspeed.config.availability import as_markdown

if __name__ == "__main__":
    print(as_markdown(), end="")
