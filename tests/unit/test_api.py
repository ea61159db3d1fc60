"""The Python face says of each function what goes in, what comes out, what it raises, and where it runs."""

from __future__ import annotations

import inspect
import re

import pytest

from changeover import api
from changeover.cli.main import main
from tests.support.docstrings import sections

FUNCTIONS = {
    name: value for name in api.__all__ if inspect.isfunction(value := getattr(api, name)) and value.__module__ == api.__name__
}


def said(name: str) -> dict[str, list[str]]:
    """Return the sections of a function's docstring, each with the names or the first words of its entries."""
    return sections(inspect.getdoc(FUNCTIONS[name]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_described_in_its_order(name: str) -> None:
    assert said(name).get("Args", []) == list(inspect.signature(FUNCTIONS[name]).parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_returned_and_raised_is_described(name: str) -> None:
    returns = inspect.signature(FUNCTIONS[name]).return_annotation != "None"
    assert ("Returns" in said(name)) is returns
    assert said(name).get("Raises") or name in ("plan", "problems"), "these two ask nobody"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_where_it_runs_is_said(name: str) -> None:
    assert re.search(r"^Runs (on the driver|anywhere)", inspect.getdoc(FUNCTIONS[name]) or "", flags=re.M)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_error_that_is_named_is_there(name: str) -> None:
    named = said(name).get("Raises", [])
    known = {*vars(__import__("changeover.errors").errors), "ValueError", "OSError"}
    assert not set(named) - known


def test_the_commands_words_are_its_words() -> None:
    """Every command is a function of the same name; `leftovers` and `purge` have their own, `demo` is no step."""
    words = {word for word in main.commands if word not in ("demo", "flags")}
    words |= set(main.commands["flags"].commands)  # type: ignore[attr-defined]
    assert not {word.replace("-", "_") for word in words} - set(FUNCTIONS)
