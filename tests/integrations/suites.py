"""What became of the libraries' own test suites: paragraphs for docs/compatibility.md."""

PARAGRAPHS: tuple[str, ...] = ("Not run.",)
