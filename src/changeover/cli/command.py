"""A command: its options, the run that it logs, its answer, and the exit code with which it ends.

Every failure ends as one sentence on standard error and the error's exit code, never as a traceback; an unforeseen one is in the
run's log file whole. `--json` prints one object on standard output and nothing else there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import psycopg

from changeover.errors import ChangeoverError, CouldNotFinish, FolderFailed, Interrupted, RowsHidden, SpecError
from changeover.files.folders import keep_private, umask, work
from changeover.files.runlog import JSON as AS_JSON
from changeover.files.runlog import TEXT, TOLD, log_file
from changeover.files.trouble import trouble
from changeover.jobs.ledger.ledger import Ledger
from changeover.session import hides_rows
from changeover.spec import Spec, load

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from changeover.verifiers.compare.verdict import Verdict

HELP = {"help_option_names": ["-h", "--help"]}
"""The settings of a context in which both words ask for help."""

SUMMARY = 45
"""Characters of a command's first sentence: the list of commands shows it whole on the narrowest terminal."""

SPEC = click.argument("spec", type=click.Path())
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
LOG_FORMAT = click.option(
    "--log-format", type=click.Choice([TEXT, AS_JSON]), default=TEXT, show_default=True,
    help="The log on standard error: lines for a person, or one JSON object a line.",
)  # fmt: skip
DEBUG = click.option("--debug", is_flag=True, help="Log at debug level.")
TARGETS = click.option("--target", "targets", multiple=True, help="Only this target; may be given more than once.")


class Command(click.Command):
    """A command with an example, under a heading of the group's help."""

    def __init__(self, *arguments: Any, example: str = "", section: str = "", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.example, self.section = example, section

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example below the options."""
        super().format_epilog(ctx, formatter)
        if self.example:
            with formatter.section("Example"):
                formatter.write(f"{'':{formatter.current_indent}}{self.example}\n")


class Sections(click.Group):
    """A group that lists its commands as they were defined, in sections."""

    command_class = Command

    def __init__(self, *arguments: Any, section: str = "", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.section = section

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of their definition."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, section by section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            section = getattr(command, "section", "") or "Commands"
            sections.setdefault(section, []).append((name, command.get_short_help_str(SUMMARY)))
        widest = max(map(len, self.commands))
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl([(f"{name:{widest}}", summary) for name, summary in rows])


class Commands(Sections):
    """A group whose commands end with our exit codes and one sentence, never with a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and turn every failure into its sentence and exit code."""
        mask = umask()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            fail(Interrupted(ctx.invoked_subcommand or "changeover"))
        except ChangeoverError as error:
            fail(error)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            fail(unforeseen(error))
        finally:
            os.umask(mask)


def unforeseen(error: Exception, log: Path | None = None) -> CouldNotFinish:
    """Return one sentence for an error that no part of ours has named; `log` holds the whole of it."""
    if isinstance(error, OSError) and error.filename is not None and (problem := trouble(error)) is not None:
        return FolderFailed(str(error.filename), problem)
    message = str(error).strip().partition("\n")[0] or type(error).__name__
    details = f"; {log} has the details" if log else ""
    if not isinstance(error, psycopg.Error):
        return CouldNotFinish(f"unexpected {type(error).__name__}: {message}{details}")
    if error.sqlstate is None or error.sqlstate.startswith("57P"):  # no answer of a server, or its last one
        return CouldNotFinish(f"a database broke off ({message}): check the servers, then run the same command again{details}")
    if hides_rows(error):
        return RowsHidden("a database", "ROLE", message)
    return CouldNotFinish(f"a database refused a statement ({message}, SQLSTATE {error.sqlstate}){details}")


def fail(error: ChangeoverError) -> NoReturn:
    """Print the sentence, unless standard error has it as JSON already, and exit."""
    if not getattr(error, TOLD, False):
        click.echo(f"changeover: {error}", err=True)
    sys.exit(error.exit_code)


def answer(value: Any, as_json: bool, text: Callable[[], str]) -> None:
    """Print a command's answer: one JSON object, or text for a person."""
    click.echo(json.dumps(plain(value), default=str, ensure_ascii=False) if as_json else text())


def plain(value: Any) -> Any:
    """Return dataclasses as dicts, for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def terminal_text(verdicts: Sequence[Verdict]) -> str:
    """Return verdicts as the terminal shows them."""
    from rich.console import Console

    from changeover.verifiers.report import print_terminal

    console = Console()
    with console.capture() as captured:
        print_terminal(verdicts, console=console)
    return captured.get().rstrip()


@contextmanager
def running(path: str, step: str, debug: bool, stream: str | None = None) -> Iterator[Spec]:
    """Load the spec and log the run into a file of its own, an unforeseen error with its whole traceback.

    With `stream` the log goes to standard error too; as JSON it ends with the sentence, which is then printed no second time.
    """
    spec = opened(path)
    logger = logging.getLogger("changeover")
    with log_file(spec, step, debug, stream) as log:
        try:
            yield spec
        except ChangeoverError as error:
            logger.error("%s", error, extra={TOLD: True})
            setattr(error, TOLD, stream == AS_JSON)
            raise
        except Exception as error:
            named = unforeseen(error, log)
            logger.error("unforeseen: %s", named, exc_info=True, extra={TOLD: True})
            setattr(named, TOLD, stream == AS_JSON)
            raise named from error


def opened(path: str) -> Spec:
    """Load the spec for a command; what the command makes is as private as the spec says."""
    spec = load(path)
    keep_private(spec)
    return spec


def spark_for(spec: Spec, step: str | None = None, targets: Sequence[str] = ()) -> SparkSession:
    """Start Spark for a command; what a step needs first, and targets that are none, are said before Spark takes its seconds."""
    from changeover.spark.launch import spark_session

    for target in targets:
        if target not in spec.targets:
            raise SpecError(spec.path, "target", f"no target is named {target}: the targets are {', '.join(spec.targets)}")
    if step is not None:
        with Ledger.open(spec, step) as ledger:
            ledger.stream(step)
    return spark_session(f"changeover:{spec.name}", scratch=work(spec, "scratch"))
