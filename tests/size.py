"""Count the lines of code that serve the API, without blank lines, comments and docstrings: `make size`."""

import ast
import io
import tokenize
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
SERVING = ("config.py", "fraud_api.py", "gunicorn.conf.py", "model.py", "server.py", "telemetry.py")
LONGEST_CLASS, LONGEST_FUNCTION = 80, 25
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def lines_of_code(source: str) -> set[int]:
    """Return the numbers of the lines that hold code."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | FUNCTION) and ast.get_docstring(node) is not None:
            found -= span(node.body[0])
    return found - {number for number, line in enumerate(source.splitlines(), 1) if not line.strip()}


def span(node: ast.stmt) -> set[int]:
    """Return the numbers of the lines from the first to the last of a statement."""
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def sources() -> dict[str, str]:
    """Return {name: source} of the files that serve the API."""
    return {name: (HERE / name).read_text() for name in SERVING if (HERE / name).exists()}


def sizes() -> dict[str, int]:
    """Return {name: lines of code} of the files that serve the API."""
    return {name: len(lines_of_code(source)) for name, source in sources().items()}


def longest_first() -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Return the classes and the functions as (lines of code, "file:line name"), each list longest first."""
    classes, functions = [], []
    for name, source in sources().items():
        code = lines_of_code(source)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef | FUNCTION):
                found = classes if isinstance(node, ast.ClassDef) else functions
                found.append((len(code & span(node)), f"{name}:{node.lineno} {node.name}"))
    return sorted(classes, reverse=True), sorted(functions, reverse=True)


def too_long() -> list[str]:
    """Return the classes over 80 and the functions over 25 lines of code."""
    classes, functions = longest_first()
    over = [found for found in classes if found[0] > LONGEST_CLASS]
    over += [found for found in functions if found[0] > LONGEST_FUNCTION]
    return [f"{where}: {lines} lines" for lines, where in over]


if __name__ == "__main__":
    for name, lines in sizes().items():
        print(f"{lines:6,} {name}")
    print(f"{sum(sizes().values()):6,} lines of code")
    for what, [(lines, where), *_] in zip(("class", "function"), longest_first(), strict=True):
        print(f"{lines:6,} in the longest {what}, {where}")
