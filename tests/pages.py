"""Reads the pages of the documentation, and does what they show as a reader would."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SKETCH = "# A sketch"
"""How the first line of a block begins that shows a form and is not meant to be run."""
QUOTE = "# fedpress/"
"""How the first line of a block begins that quotes a file of the source."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: its name, such as "docs/data.md".
        line: where the block begins.
        section: the heading above it.
        language: what stands behind the fence; "" if nothing.
        file: the name that the line above it gives, as in "`visits.toml`, beside the table:".
        body: its text.
    """

    page: str
    line: int
    section: str
    language: str
    file: str
    body: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """Returns the blocks of a page, such as "README.md" or "docs/data.md"."""
    text = (ROOT / page).read_text("utf-8")
    found = []
    for match in re.finditer(r"^```([\w-]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        before = text[: match.start()]
        # A comment in an earlier block is no heading.
        plain = re.sub(r"^```.*?^```", "", before, flags=re.MULTILINE | re.DOTALL)
        headings = re.findall(r"^#+ (.*)$", plain, re.MULTILINE)
        above = before.rstrip().rpartition("\n\n")[2]
        ending = {"python": "py", "toml": "toml"}.get(match[1], "-")
        named = re.search(rf"`([\w.]+\.{ending})`[^`]*:$", above)
        found.append(
            Block(
                page,
                before.count("\n") + 1,
                headings[-1] if headings else "",
                match[1],
                named[1] if named else "",
                match[2],
            )
        )
    return found


def all_blocks(*languages: str) -> list[Block]:
    """Returns the blocks of all pages in these languages."""
    found: list[Block] = []
    for path in PAGES:
        page = str(path.relative_to(ROOT))
        found += [block for block in blocks(page) if block.language in languages]
    return found


def commands(text: str) -> Iterator[list[str]]:
    """Yields the words of each command of fedpress in a text, without comments.

    >>> list(commands("fedpress run digits seed=1  # a comment\\npip install x"))
    [['fedpress', 'run', 'digits', 'seed=1']]
    """
    for line in text.splitlines():
        if line.startswith("fedpress "):
            yield shlex.split(line, comments=True)


def do(found: list[Block], shell: Callable[..., Any]) -> dict[str, Any]:
    """Does what blocks say, from top to bottom, in the working folder.

    A block with the name of a file is written to it. Other Python is run, and so are the lines of
    blocks of the language `sh`; a command that fails fails the test.

    Returns:
        The names that the Python has made.
    """
    # The page's own modules are imported from the folder of the reader.
    sys_path = [*sys.path]
    sys.path.insert(0, str(Path.cwd()))
    before = {*sys.modules}
    names: dict[str, Any] = {"__name__": "page"}
    try:
        for block in found:
            _do_one(block, shell, names)
    finally:
        # fedpress moves the working folder to the end, so it is not where it was put.
        sys.path[:] = sys_path
        for name in {*sys.modules} - before:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if Path(file).is_relative_to(Path.cwd()):
                del sys.modules[name]
    return names


def _do_one(block: Block, shell: Callable[..., Any], names: dict[str, Any]) -> None:
    if block.file:
        Path(block.file).write_text(block.body, "utf-8")
    elif block.language == "python" and not block.body.startswith((SKETCH, QUOTE)):
        # Lines of the page stand in tracebacks.
        code = "\n" * block.line + block.body
        made = compile(code, str(ROOT / block.page), "exec", dont_inherit=True)
        exec(made, names)
    elif block.language == "sh":
        for line in block.body.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["python"]:
                runpy.run_path(words[1], run_name="__main__")
            elif words[:1] == ["fedpress"]:
                said = shell(*words[1:])
                assert said.code == 0, f"{block}: {line}\n{said.out}\n{said.err}"
            else:
                assert not words, f"{block}: the test does not know how to run {line!r}"
