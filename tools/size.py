"""Code lines of the package, the kernels and the tests against their bounds; files too long; import circles.

A code line holds something else than blanks, comments and docstrings.  `make check` fails on what is over its bound.  A bound
is what was reached; it goes down towards the aim.  A feature may raise both by the lines that it needs, said in its commit.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
BOUNDS = {"package": 8690, "kernels": 1890, "tests": 11535}  # code lines; kernels/ is part of the package
AIMS = {"package": 4400, "kernels": 1100, "tests": 6500}
LONGEST_FILE = 300  # lines, whatever they hold
FOLDERS = {
    "package": ("fastlora", "kernels"),
    "kernels": ("kernels",),
    "tests": ("tests",),
    "benches": ("benches",),
    "tools": ("tools",),
}
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def main() -> int:
    """Print the table and what is wrong; 1 where something is."""
    complaints = []
    table = Table("part", "code lines", "bound", "aim", "files", "longest file", title="size")
    for part, folders in FOLDERS.items():
        files = [file for folder in folders for file in sources(folder)]
        lines, bound = sum(map(code_lines, files)), BOUNDS.get(part)
        longest = max(files, key=total_lines)
        limits = ("", "") if bound is None else (f"{bound:,}", f"{AIMS[part]:,}")
        table.add_row(part, f"{lines:,}", *limits, str(len(files)), f"{longest.relative_to(ROOT)} ({total_lines(longest)})")
        if bound is not None and lines > bound:
            complaints.append(f"{part}: {lines} code lines, the bound is {bound}")
        too_long = [file for file in files if total_lines(file) > LONGEST_FILE]
        complaints += [f"{file.relative_to(ROOT)}: {total_lines(file)} lines, {LONGEST_FILE} is the most" for file in too_long]
    complaints += [f"import circle: {' -> '.join(circle)}" for circle in circles(imports())]
    complaints += [f"kernels/ is a leaf, but {name} imports {what}" for name, what in above_the_leaf()]
    Console().print(table)
    for complaint in dict.fromkeys(complaints):
        print(complaint)
    return 1 if complaints else 0


def sources(folder: str) -> list[Path]:
    """The Python files below a folder of the repository, links left out."""
    return sorted(path for path in (ROOT / folder).rglob("*.py") if ROOT / "fastlora" / "kernels" not in path.parents)


def total_lines(file: Path) -> int:
    """All lines of a file."""
    return len(file.read_text().splitlines())


def code_lines(file: Path) -> int:
    """Lines of a file that hold code."""
    text = file.read_text()
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        scope = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if scope and ast.get_docstring(node, clean=False) is not None:  # type: ignore[arg-type]  # a scope, as isinstance says
            first = node.body[0]  # type: ignore[attr-defined]  # scopes have a body
            documentation |= set(range(first.lineno, first.end_lineno + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - documentation)


def imports() -> dict[str, set[str]]:
    """Module of the package -> the modules of the package that it imports at its top level."""
    files = {_module(file): file for folder in ("fastlora", "kernels") for file in sources(folder)}
    return {name: set(_top_level(file, name, set(files))) for name, file in files.items()}


def _module(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"fastlora.{name}" if name.startswith("kernels") else name


def _top_level(file: Path, importer: str, modules: set[str]) -> Iterator[str]:
    for node in ast.parse(file.read_text()).body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in inner]
        yield from (name for name in names if name in modules and name != importer)


def circles(graph: dict[str, set[str]]) -> Iterable[list[str]]:
    """The circles of a graph, each once, from its alphabetically first module on."""
    found: set[tuple[str, ...]] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            circle = path[path.index(name) :]
            start = circle.index(min(circle))
            found.add((*circle[start:], *circle[:start]))
        elif name not in done:
            for other in sorted(graph[name]):
                walk(other, [*path, name])
            done.add(name)

    done: set[str] = set()
    for name in sorted(graph):
        walk(name, [])
    return [[*circle, circle[0]] for circle in sorted(found)]


def above_the_leaf() -> Iterator[tuple[str, str]]:
    """What a kernel's module imports of the package besides other kernels and the mask's specification."""
    for name, imported in imports().items():
        if name.startswith("fastlora.kernels"):
            yield from ((name, what) for what in imported if not what.startswith(("fastlora.kernels", "fastlora.dropout")))


if __name__ == "__main__":
    sys.exit(main())
