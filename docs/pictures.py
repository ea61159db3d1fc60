"""The pictures of README and documentation, made again from real runs.

`python docs/pictures.py` makes all of them, and `python docs/pictures.py pipeline` one. `terminal` is what `changeover demo` wrote
to a terminal, replayed and drawn. `report` is the page of a demo whose new store was damaged, as Chromium shows it. Each of these
two runs a whole demo and takes minutes.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

IMAGES = Path(__file__).parent / "images"

WIDTH, LINES = 104, 200
"""The terminal that the demo is told of: tables fit it, and nothing scrolls away."""

COLUMNS = 400
"""The columns in which its output is replayed: no line is broken there, for a terminal would break it within a word."""

INDENT = 23
"""Where a line that is folded at a space goes on: below the text of its step."""

PAGE = (1280, 1010)
"""What of the report is shown, in CSS pixels: the verdict, the stores, and the row that differs."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


# -- the pipeline


@dataclass(frozen=True)
class Box:
    """A box of the pipeline's picture: a title and lines under it."""

    x: int
    y: int
    width: int
    height: int
    title: str
    lines: tuple[str, ...] = ()
    kind: str = "step"

    def svg(self) -> str:
        """Return the box as SVG."""
        middle = self.x + self.width / 2
        step = 17
        top = self.y + self.height / 2 - step * len(self.lines) / 2 + 5
        parts = [
            f'<rect class="{self.kind}" x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="8"/>',
            f'<text class="title" x="{middle:g}" y="{top:g}">{escape(self.title)}</text>',
        ]
        parts += [
            f'<text class="line" x="{middle:g}" y="{top + step * (place + 1):g}">{escape(line)}</text>'
            for place, line in enumerate(self.lines)
        ]
        return "\n".join(parts)


@dataclass(frozen=True)
class Arrow:
    """An arrow along points, with a label beside it."""

    points: tuple[tuple[int, int], ...]
    label: str = ""
    at: tuple[int, int] = (0, 0)
    kind: str = "flow"

    def svg(self) -> str:
        """Return the arrow as SVG."""
        path = " L".join(f"{x} {y}" for x, y in self.points)
        drawn = f'<path class="{self.kind}" d="M{path}" marker-end="url(#{self.kind}-head)"/>'
        if not self.label:
            return drawn
        return f'{drawn}\n<text class="label" x="{self.at[0]}" y="{self.at[1]}">{escape(self.label)}</text>'


BOXES = (
    Box(340, 16, 280, 62, "your application", ("its router follows the flag and the fence",), "store"),
    Box(24, 196, 190, 96, "old store", ("PostgreSQL", "authority until the fence"), "store"),
    Box(746, 196, 190, 96, "new store", ("PostgreSQL or Delta Lake", "version gate, tombstones"), "store"),
    Box(364, 136, 232, 62, "backfill", ("one snapshot, in chunks, by Spark",)),
    Box(286, 226, 170, 62, "capture", ("a durable spool",)),
    Box(504, 226, 170, 62, "replay", ("in order, for each row",)),
    Box(364, 366, 232, 62, "verify", ("every row, at one moment",)),
    Box(290, 476, 380, 62, "flag", ("off → dualwrite → shadow → live → rampdown → complete",)),
)

ARROWS = (
    Arrow(((340, 47), (119, 47), (119, 190)), "writes", (200, 38)),
    Arrow(((620, 47), (841, 47), (841, 190)), "mirror, then writes", (740, 38)),
    Arrow(((214, 214), (280, 167), (358, 167)), "snapshot", (262, 158)),
    Arrow(((596, 167), (680, 167), (740, 214)), "reshaped rows", (700, 158)),
    Arrow(((214, 257), (280, 257)), "log", (247, 249)),
    Arrow(((456, 257), (498, 257))),
    Arrow(((674, 257), (740, 257)), "changes", (707, 249)),
    Arrow(
        ((841, 292), (841, 326), (119, 326), (119, 298)),
        "after the fence: reverse replication, by the same path",
        (480, 318),
        "back",
    ),
    Arrow(((60, 292), (60, 397), (358, 397)), "old, at LSN X", (210, 389)),
    Arrow(((900, 292), (900, 397), (602, 397)), "new, at LSN X", (750, 389)),
    Arrow(((480, 428), (480, 470)), "equal opens the next step", (572, 454)),
)

STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
  --ink: #1b1d20; --dim: #5b6068; --line: #8b919a; --back: #a3542b;
  --step: #e8f0fb; --step-edge: #5b86c4; --store: #f3f1ea; --store-edge: #a39a80; }
@media (prefers-color-scheme: dark) { svg {
  --ink: #e7e8ea; --dim: #a4abb5; --line: #7d848e; --back: #e39a70;
  --step: #1c2b40; --step-edge: #5b86c4; --store: #2b2a25; --store-edge: #857d66; } }
rect { stroke-width: 1.5; }
.step { fill: var(--step); stroke: var(--step-edge); }
.store { fill: var(--store); stroke: var(--store-edge); }
text { text-anchor: middle; fill: var(--ink); }
.title { font-size: 16px; font-weight: 600; }
.line, .label { font-size: 12.5px; fill: var(--dim); }
path { fill: none; stroke: var(--line); stroke-width: 1.6; }
.back { stroke: var(--back); stroke-dasharray: 6 4; }
#flow-head path { fill: var(--line); stroke: none; }
#back-head path { fill: var(--back); stroke: none; }
"""

DESCRIPTION = (
    "The application writes to the old store. Backfill copies a snapshot and capture spools the log, from which replay brings every"
    " later change. Verify compares every row at one moment, and its verdict opens the flag's next step."
)


def pipeline(rows: int) -> Path:
    """Draw the pipeline.

    Args:
        rows: Not used: nothing is run.

    Returns:
        The file that was written.
    """
    heads = "".join(
        f'<marker id="{kind}-head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z"/></marker>'
        for kind in ("flow", "back")
    )
    drawn = "\n".join(part.svg() for part in (*ARROWS, *BOXES))
    path = IMAGES / "pipeline.svg"
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 556" role="img" aria-labelledby="what how">\n'
        f'<title id="what">The pipeline of changeover</title>\n<desc id="how">{escape(DESCRIPTION)}</desc>\n'
        f"<style>{STYLE}</style>\n<defs>{heads}</defs>\n{drawn}\n</svg>\n",
        encoding="utf-8",
    )
    return path


# -- the demo's terminal


def terminal(rows: int) -> Path:
    """Run the demo on a terminal and draw what it left there.

    Args:
        rows: Rows of the old table.

    Returns:
        The file that was written.
    """
    from rich.console import Console

    with passable_folder() as folder:
        work = folder / "demo"
        code, written = on_terminal([*demo(rows), "--work", str(work)])
        if code != 0:
            raise SystemExit(f"the demo ended with {code}: {written.decode(errors='replace')[-2000:]}")
        text = written.replace(str(work).encode(), b"/tmp/changeover-demo")
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w", encoding="utf-8"), force_terminal=True)  # noqa: SIM115
    console.print(f"$ changeover demo --rows {rows}", highlight=False, style="bold")
    for line in screen(text):
        for part in folded(line):
            console.print(part, no_wrap=True, crop=False)
    path = IMAGES / "demo.svg"
    console.save_svg(str(path), title="changeover demo", code_format=own_fonts(), unique_id="demo")
    return path


@contextmanager
def passable_folder() -> Iterator[Path]:
    """Lend a folder through which the user of the demo's server can pass: under root that is another one."""
    with tempfile.TemporaryDirectory(prefix="changeover-pictures-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        yield folder


def demo(rows: int, *more: str) -> list[str]:
    """Return the command that runs the demo."""
    return [sys.executable, "-m", "changeover.cli.main", "demo", "--rows", str(rows), *more]


def on_terminal(command: Sequence[str]) -> tuple[int, bytes]:
    """Run a command on a pseudo-terminal of our size; return its exit code and all that it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, WIDTH, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(WIDTH), "LINES": str(LINES), "COLORTERM": "truecolor"}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = bytearray()
    with ended(process):
        while chunk := read(ours):
            written += chunk
        os.close(ours)
        return process.wait(), bytes(written)


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Have a process end with the block; a demo that is ended so takes its server with it."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def read(descriptor: int) -> bytes:
    """Read from a pseudo-terminal, whose end is an error on Linux."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


def screen(written: bytes) -> list[Text]:
    """Replay what was written to a terminal; return the lines that stand there at the end, with their colours."""
    import pyte
    from rich.text import Text

    shown = pyte.Screen(COLUMNS, LINES)
    pyte.ByteStream(shown).feed(written)
    lines: list[Text] = []
    for number in range(LINES):
        line = Text()
        for column in range(COLUMNS):
            cell = shown.buffer[number][column]
            line.append(cell.data, style=style(cell.fg, cell.bold, cell.italics))
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def folded(line: Text) -> list[Text]:
    """Return a line in parts that fit the picture."""
    parts = []
    while len(line) > WIDTH and (space := line.plain.rfind(" ", INDENT, WIDTH)) > 0:
        head, line = line.divide([space])
        parts.append(head)
        line = line[1:]
        line.pad_left(INDENT)
    return [*parts, line]


def style(colour: str, bold: bool, italic: bool) -> str:
    """Return rich's name of a cell's style."""
    words = [word for word, set_ in (("bold", bold), ("italic", italic)) if set_]
    if len(colour) == 6 and all(digit in "0123456789abcdef" for digit in colour):
        words.append(f"#{colour}")
    elif colour != "default":
        words.append({"brown": "yellow"}.get(colour, colour.replace("bright", "bright_")))
    return " ".join(words)


def own_fonts() -> str:
    """Return rich's frame of an SVG without the fonts that it would load from elsewhere."""
    from rich._export_format import CONSOLE_SVG_FORMAT

    head, _, rest = CONSOLE_SVG_FORMAT.partition("@font-face")
    return head + rest[rest.index(".{unique_id}-matrix") :]


# -- the report


def report(rows: int) -> Path:
    """Damage the new store of a demo, verify it, and photograph the report.

    Args:
        rows: Rows of the old table.

    Returns:
        The file that was written.
    """
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"report: none of {', '.join(BROWSERS)} is installed")
    path = IMAGES / "report.png"
    with passable_folder() as folder:
        page = verified(folder / "demo", rows)
        width, height = PAGE
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/browser",
                f"--window-size={width},{height}", f"--screenshot={path}", page.as_uri(),
            ],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    return path


def verified(work: Path, rows: int) -> Path:
    """Keep a damaged demo in a folder, verify it by the commands that it leaves to try, and return the report."""
    from changeover.embedded.server import EmbeddedServer

    try:
        differs(demo(rows, "--break", "timezone", "--keep", "--work", str(work)), dict(os.environ))
        exported = (line.removeprefix("export ") for line in (work / "demo.env").read_text(encoding="utf-8").splitlines())
        environment = {**os.environ, **dict(shlex.split(line)[0].split("=", 1) for line in exported)}
        command, spec = [sys.executable, "-m", "changeover.cli.main"], str(work / "follows.toml")
        with ended(subprocess.Popen([*command, "capture", spec], env=environment, stderr=subprocess.DEVNULL)):
            differs([*command, "verify", spec, "--report", str(work / "verify.html")], environment)
        return work / "verify.html"
    finally:
        if (work / "server").exists():
            EmbeddedServer.attach(work / "server").remove()


def differs(command: Sequence[str], environment: dict[str, str]) -> None:
    """Run a command that has to find rows that differ."""
    process = subprocess.Popen(command, env=environment)
    with ended(process):
        code = process.wait()
    if code != 1:
        raise SystemExit(f"{command[-1]} ended with {code} and not with 1, which says that rows differ")


PICTURES: dict[str, Callable[[int], Path]] = {"pipeline": pipeline, "terminal": terminal, "report": report}


def main() -> None:
    """Make the pictures that are asked for, all of them unless some are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", choices=[*PICTURES, []], help="all unless named")
    parser.add_argument("--rows", type=int, default=5000, help="rows of the demo's old table")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    IMAGES.mkdir(exist_ok=True)
    for name in arguments.pictures or PICTURES:
        print(PICTURES[name](arguments.rows))


if __name__ == "__main__":
    main()
