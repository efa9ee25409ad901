"""The tables in README.md and k8s/README.md that programs write."""

from pathlib import Path

HERE = Path(__file__).parent.parent


def write_table(target: str, text: str, name: str = "README.md") -> None:
    """Write what a target of the Makefile has measured between the comments that name it."""
    head, tail = f"<!-- make {target} writes from here -->", "<!-- to here -->"
    before, _, rest = (HERE / name).read_text().partition(head)
    (HERE / name).write_text(f"{before}{head}\n{text}\n{tail}{rest.partition(tail)[2]}")
