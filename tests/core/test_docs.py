"""The pages in Markdown: Python blocks run and print what they say; commands, names, links and reasons exist in the code."""

import ast
import contextlib
import importlib
import io
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from pydoc import locate

import pytest

from fastlora import cli

ROOT = Path(__file__).parents[2]
PATTERNS = ("*.md", "benches/**/*.md", "docs/*.md", "examples/*.md", ".github/**/*.md", ".github/workflows/*.yml")
PAGES = sorted(page for pattern in PATTERNS for page in ROOT.glob(pattern))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of the page's code blocks in a language."""
    text = page.read_text()
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, found.start(1)), found[1]


def inline_code(page: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose)


def promised(block: str) -> list[str]:
    """What a block says that it prints: comments on lines of their own, and comments after a print."""
    return re.findall(r"^(?:.*\bprint\w*\(.*\)\s+)?# (.*)$", block, re.MULTILINE)


@pages
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, block in blocks(page, "python"):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * line + block, page, "exec"), namespace)
        for text in promised(block):
            pattern = re.escape(text).replace(re.escape("..."), ".*")
            assert re.search(rf"^{pattern}$", printed.getvalue(), re.MULTILINE), (text, printed.getvalue())


def test_promises_are_found():
    assert promised("x = 1  # a comment\nprint(x)  # 1\n# 2\n    # inside\n") == ["1", "2"]
    assert sum(len(promised(block)) for page in PAGES for _, block in blocks(page, "python")) >= 8
    assert sum(1 for page in PAGES for _ in blocks(page, "python")) >= 20


@pages
def test_commands_exist(page, monkeypatch):
    for command in cli.COMMANDS:  # parse the arguments, but run nothing
        monkeypatch.setattr(importlib.import_module(f"fastlora.cli.{command}"), "run", lambda args: 0)
    lines = [line for _, block in blocks(page, "bash") for line in block.splitlines()]
    lines += [code for code in inline_code(page) if re.match(r"(\w+=\S+ )*(make|fastlora|python|pip|pytest) ", code)]
    lines += re.findall(r"^ +(?:- )?run: (.+)$", page.read_text(), re.MULTILINE)
    for line in lines:
        check_command([word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)])


def check_command(words: list[str]) -> None:
    """Fail for a command that does not exist, or does not take these arguments."""
    match words:
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        case ["fastlora", command]:
            assert command in cli.COMMANDS, words
        case ["fastlora", *arguments]:
            assert cli.main(arguments) == 0, words
        case ["python", "-m", module, *_]:
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), words
        case ["python", script, *_]:
            assert (ROOT / script).is_file(), words
        case ["pytest", "-m", mark, *_]:
            assert any(line.startswith(f"{mark}:") for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]), words
        case ["pytest", path, *_]:
            assert (ROOT / path).exists(), words
        case ["compute-sanitizer", "--tool", _, *program]:
            check_command(program)
        case ["pip", "install", what, *_]:
            extras = re.fullmatch(r"\.(?:\[(.*)\])?", what)
            assert extras, words
            assert not extras[1] or set(extras[1].split(",")) <= set(PROJECT["project"]["optional-dependencies"]), words
        case _:
            pytest.fail(f"a command that this test does not know: {words}")


@pytest.mark.parametrize(
    "command",
    ["make dmeo", "fastlora tune --modle x", "fastlora tun", "python examples/a.py", "pip install '.[hg]'", "rm -r x"],
)
def test_wrong_commands_are_seen(command, capsys):
    with pytest.raises((AssertionError, SystemExit, pytest.fail.Exception)):
        check_command(shlex.split(command))


@pages
def test_names_and_links_exist(page):
    for code in inline_code(page):
        if found := re.match(r"fastlora(\.[A-Za-z_]\w*)+(?![\w/])", code):
            assert locate(found[0]) is not None, code
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", [ROOT / "README.md", *ROOT.glob("docs/*.md")], ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_short_and_listed(page):
    assert len(page.read_text().splitlines()) < (150 if page.parent == ROOT else 120)
    assert page.name == "README.md" or f"({page.name})" in (ROOT / "docs/README.md").read_text()


def test_the_picture_is_what_its_script_draws(tmp_path):
    picture = ROOT / "docs/figures/how_it_works.svg"
    runpy.run_path(str(picture.with_suffix(".py")))["main"](["--svg", str(tmp_path / picture.name)])
    assert (tmp_path / picture.name).read_bytes() == picture.read_bytes()


#: Where reasons are given: in these functions, and in constants of their modules.
SOURCES = {
    "peft/base.py": {"weight_of"},
    "peft/adapters.py": {"active", "adapters", "adapter", "_adapter", "_magnitude"},
    "peft/calls.py": {"operands", "unsupported_input", "decide"},
    "peft/experts.py": {"unsupported_reason", "_decide", "terms", "_unsupported_experts"},
    "peft/layers.py": {"unsupported_reason"},
    "peft/report.py": set(),
    "quantized/__init__.py": {"unsupported_input"},
    "peft/state.py": {"only_adapter", "unsupported_tensors", "unsupported_call"},
    "peft/embedding.py": {"unsupported_reason", "terms", "_decide"},
    "peft/conv.py": {"unsupported_reason", "terms", "_decide"},
    **{f"quantized/{library}.py": {"read"} for library in ("bitsandbytes", "torchao", "hqq", "gptq", "fp8")},
}
#: What other reasons are put into.
FRAMES = {"its base layer …", " under autocast to …"}


def reasons() -> Iterator[str]:
    """Every reason that the package gives for PEFT's forward, with an ellipsis for what is filled in."""
    for path, functions in SOURCES.items():
        tree = ast.parse((ROOT / "fastlora" / path).read_text())
        bodies = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in functions]
        assert len(bodies) == len(functions), path
        parts = [*bodies, *(node for node in tree.body if isinstance(node, ast.Assign))]
        nodes = [node for part in parts for node in ast.walk(part) if isinstance(node, (ast.Return, ast.Assign))]
        for value in (node.value for node in nodes):
            for option in (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,):
                words = option.values if isinstance(option, ast.JoinedStr) else (option,)
                text = "".join(str(word.value) if isinstance(word, ast.Constant) else "…" for word in words)
                if isinstance(option, (ast.JoinedStr, ast.Constant)) and " " in text and text not in FRAMES:
                    yield text


def test_every_reason_is_documented_and_every_documented_one_is_given():
    table = (ROOT / "docs/coverage.md").read_text().partition("## Layers that are left")[2].partition("```python")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    documented = [code for row in rows for code in re.findall(r"`([^`]+)`", row)]
    given = list(reasons())
    assert len(given) >= 25
    assert [text for text in given if not any(code in text for code in documented)] == []
    assert [code for code in documented if not any(code in text for text in given)] == []
