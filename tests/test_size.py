"""The service stays small, and README says how small."""

import re

import size
from conftest import HERE

MOST = 1515


def test_total() -> None:
    """The service does not grow."""
    assert sum(size.sizes().values()) <= MOST


def test_classes_and_functions() -> None:
    """No class has more than 80 lines of code, no function more than 25."""
    assert size.too_long() == []


def test_readme_states_the_total() -> None:
    head = "\n".join((HERE / "README.md").read_text().splitlines()[:60])
    [stated] = re.findall(r"([\d,]+) lines of code", head)
    assert int(stated.replace(",", "")) == sum(size.sizes().values())


def test_what_counts() -> None:
    """Lines of a statement or a string count; blank lines, comments and docstrings do not."""
    source = '''
        """A docstring
        of two lines."""

        # a comment
        def one(  # a comment behind code
            two: int,
        ) -> str:
            "Another docstring."

            return """a string

            of two lines"""
    '''
    lines = [line.removeprefix(" " * 8) for line in source.splitlines()]
    counted = [lines[number - 1].strip() for number in sorted(size.lines_of_code("\n".join(lines)))]
    expected = ["def one(  # a comment behind code", "two: int,", ") -> str:", 'return """a string', 'of two lines"""']
    assert counted == expected
