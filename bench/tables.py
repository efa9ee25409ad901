"""The tables in README.md that programs write."""

from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def write_table(target: str, text: str) -> None:
    """Write what a target of the Makefile has measured between the comments that name it."""
    head, tail = f"<!-- make {target} writes from here -->", "<!-- to here -->"
    before, _, rest = README.read_text().partition(head)
    README.write_text(f"{before}{head}\n{text}\n{tail}{rest.partition(tail)[2]}")
