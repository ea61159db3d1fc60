"""A check of prose: no sentence of the project's pages has more than 30 words.

    python docs/prose.py

Code blocks, tables, link targets and comments are left out, and a piece of inline code is one word. Each longer sentence is
printed with its file and line, and the exit code is then 1.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
# The mark is 25 words; the check leaves room for a list of names.
MOST_WORDS = 30
PAGES = ("*.md", *(f"{folder}/**/*.md" for folder in ("docs", "examples", "jobs", "flags", "verifiers", "src")))
# The record of changes is no prose to read from end to end.
LEFT_OUT = {"CHANGELOG.md"}
# A sentence ends at its mark, with what closes behind it, before a space.
END = re.compile(r"(?<!e\.g)(?<!i\.e)[.!?][\"')\]]*[ \n]+")
WORD = re.compile(r"\w")
HARD = "\N{NO-BREAK SPACE}"
# Directives whose body is prose.
NOTES = re.compile(r"^\{(note|tip|important|warning|caution|admonition)\}")


def pages() -> list[Path]:
    """Return every page that is checked; the links under `src` are not followed."""
    found = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    return sorted(path for path in found if path.name not in LEFT_OUT and "_build" not in path.parts)


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Return each sentence of a page with the line on which it begins, from 1."""
    if text.startswith("---\n"):  # settings of a page
        text = re.sub(r"^(---\n.*?\n---\n)", lambda found: "\n" * found[1].count("\n"), text, count=1, flags=re.S)
    table = False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        table = token.type == "table_open" or (table and token.type != "table_close")
        if table or token.map is None:
            continue
        if token.type == "inline":
            yield from _split(_plain(token), token.map[0] + 1)
        elif token.type == "fence" and NOTES.match(token.info):
            for line, sentence in sentences(token.content):
                yield token.map[0] + 1 + line, sentence


def _plain(token: Token) -> str:
    """Return what a reader sees of a paragraph; the spaces in a piece of code are made hard, so that it is one word."""
    shown = {"text": "{}", "code_inline": "`{}`", "softbreak": "\n"}
    return "".join(
        shown[one.type].format(one.content.replace(" ", HARD) if one.type == "code_inline" else one.content)
        for one in token.children or ()
        if one.type in shown
    )


def _split(text: str, line: int) -> Iterator[tuple[int, str]]:
    begin = 0
    for end in [*(found.end() for found in END.finditer(text)), len(text)]:
        if sentence := text[begin:end].strip():
            yield line + text[:begin].count("\n"), sentence
        begin = end


def words(sentence: str) -> int:
    """Return the count of words; a dash between spaces is none."""
    return sum(1 for word in re.split(r"[ \n]+", sentence) if WORD.search(word))


def too_long(path: Path) -> list[str]:
    """Return the sentences of a page that are too long, each as a line for a person."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {count} words: {' '.join(sentence.split())}"
        for line, sentence in sentences(path.read_text(encoding="utf-8"))
        if (count := words(sentence)) > MOST_WORDS
    ]


if __name__ == "__main__":
    found = [line for path in pages() for line in too_long(path)]
    print(*found, sep="\n" if found else "", end="\n" if found else "")
    sys.exit(1 if found else 0)
