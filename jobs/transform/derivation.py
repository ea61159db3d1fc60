"""Derivations: where the value of each target column comes from, as data (pure).

A target column either holds one source column as it is, under its own name or another one, or is computed by an expression of the
spec's. That it is carried is known by construction, whatever the column's name; nobody reads it out of an expression's text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from changeover.names import folded, quoted
from changeover.spec import IDENTIFIER, Table
from changeover.stores.base.pgtypes import Column

WORDS = frozenset({"true", "false", "null"})
"""Expressions of one word that name no column."""

QUOTED = re.compile(r"`((?:[^`]|``)+)`")
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Derivation:
    """What fills a target column: an expression in Spark SQL, and `origin` where that is a source column as it is."""

    expression: str
    origin: str | None = None


def reference(text: str) -> str | None:
    """Return the name that an expression consists of and nothing else, None for any other expression."""
    bare = text.strip()
    if IDENTIFIER.fullmatch(bare):
        return None if bare.lower() in WORDS else bare
    match = QUOTED.fullmatch(bare)
    return match[1].replace("``", "`") if match else None


def origin(table: Table, name: str) -> str | None:
    """Return the source column that a target column of this name holds as it is (pure).

    Args:
        table: The table of the spec.
        name: The target column.

    Returns:
        The source column, None where the target column holds something else.
    """
    if table.function is not None:
        return None
    return reference(table.columns[name]) if name in table.columns else name


def derivations(table: Table, source: Sequence[Column]) -> dict[str, Derivation]:
    """Return what fills each target column, in order (pure).

    The spec's own come first, then what is carried over by name. After a function no column is
    known to be what it was.

    Args:
        table: The table of the spec.
        source: The source table's columns.

    Returns:
        Target column and what fills it.
    """
    names = [c.name for c in source]
    own = {name: _stated(text, names) for name, text in table.columns.items()}
    moved = {one.origin for one in own.values()}
    carried = [name for name in names if name not in moved and name not in table.columns and name not in table.drop]
    all_columns = {**own, **{name: Derivation(quoted(name), name) for name in carried}}
    return all_columns if table.function is None else {name: Derivation(one.expression) for name, one in all_columns.items()}


def owned(table: Table, wanted: Mapping[str, Derivation], identity: Collection[str]) -> bool:
    """Return whether source keys are kept beside the target's (pure).

    What a function makes is not known, and whether it keeps a column of ours is not either:
    verification alone looks at its keys.

    They are where nothing proves that no two of them make one of the target's keys.

    Args:
        table: The table of the spec.
        wanted: What fills each target column.
        identity: The columns of the replica identity.

    Returns:
        Whether each live row's source key is kept.
    """
    return table.function is None and not set(identity) <= {wanted[column].origin for column in table.key if column in wanted}


def _stated(text: str, names: Sequence[str]) -> Derivation:
    """Return the derivation of a column that the spec states; Spark finds a column by its name in any case."""
    name = reference(text)
    alike = [] if name is None else [one for one in names if folded(one) == folded(name)]
    origin = name if name in alike else alike[0] if len(alike) == 1 else None
    return Derivation(text) if origin is None else Derivation(quoted(origin), origin)


TOKEN = re.compile(r"""'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.|"")*"|`(?:[^`]|``)+`|\w+""", re.DOTALL)
"""A literal, a quoted name or a word of Spark SQL."""


def resolved(text: str, held: Mapping[str, str]) -> str:
    """Return an expression whose columns are found in a frame that holds them by other names, as `names.held` has it.

    A column that differs from another one in case alone is meant where its name is written as it is.
    """
    apart = {name: other for name, other in held.items() if name != other}

    def named(match: re.Match[str]) -> str:
        token = match[0]
        name = token[1:-1].replace("``", "`") if token.startswith("`") else token
        called = token == name and re.match(r"\s*\(", text[match.end() :])
        inside = text[: match.start()].rstrip().endswith(".")
        return token if name not in apart or called or inside else apart[name]

    return TOKEN.sub(named, text) if apart else text


def mentioned(names: Collection[str], texts: Collection[str]) -> frozenset[str]:
    """Return the columns that any of some expressions may ask for; in doubt a column is one."""
    words = {folded(word) for text in texts for word in WORD.findall(text)}
    whole = folded("\n".join(texts))
    return frozenset(name for name in names if (folded(name) in words if WORD.fullmatch(name) else folded(quoted(name)) in whole))
