"""Help: commands in the order of the pipeline, whole summaries, an example that is taken, and completion."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from changeover.cli import demo as demo_command
from changeover.cli.command import SUMMARY, Command
from changeover.cli.main import main


def every_command(group: click.Group = main, *words: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, *words, name)
        else:
            yield (*words, name), command


EVERY = dict(every_command())


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_every_command_has_a_summary_that_is_not_cut_and_an_example_that_is_taken(words: tuple[str, ...]) -> None:
    command = EVERY[words]
    assert not command.get_short_help_str(SUMMARY).endswith("...")
    command = demo_command.main if words == ("demo",) else command
    assert isinstance(command, Command)
    assert command.example.split()[: len(words) + 1] == ["changeover", *words]
    told = CliRunner().invoke(main, [*words, "-h"])
    assert (told.exit_code, f"Example:\n  {command.example}\n" in told.stdout) == (0, True)
    command.make_context(words[-1], shlex.split(command.example)[len(words) + 1 :]).close()


def test_help_lists_the_commands_in_the_order_of_the_pipeline() -> None:
    told = CliRunner().invoke(main, ["-h"]).stdout
    sections = re.findall(r"^(\w[\w ]*):$", told, re.MULTILINE)
    assert sections == ["Options", "Plan", "Move", "Hand over", "Look", "End", "Try"]
    listed = re.findall(r"^  (\w+) ", told.partition("Plan:")[2], re.MULTILINE)
    assert listed == [
        "init", "check", "plan", "prove", "run", "prepare", "capture", "backfill", "replay", "verify", "flags", "explain", "status",
        "history", "finalize", "purge", "abort", "demo",
    ]  # fmt: skip


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(shell: str) -> None:
    program = [str(Path(sys.executable).parent / "changeover")]
    told = subprocess.run(
        program, env={**os.environ, "_CHANGEOVER_COMPLETE": f"{shell}_source"}, capture_output=True, text=True, check=True
    ).stdout
    assert "_CHANGEOVER_COMPLETE" in told
