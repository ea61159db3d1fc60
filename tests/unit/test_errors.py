"""Errors: every class survives a pickle round trip, says one sentence and has its documented exit code."""

from __future__ import annotations

import pickle
from dataclasses import fields

import pytest

from changeover import errors
from changeover.errors import ChangeoverError

EXIT_CODES = {
    "UsageError": 2, "SpecError": 2, "SecretMissing": 2, "StepOrder": 2,
    "Refused": 1, "UnsafePlan": 1, "TargetNotEmpty": 1, "NotReady": 1, "TableStopped": 1, "ChangesUntold": 1,
    "CouldNotFinish": 3, "ServerUnavailable": 3, "DatabaseFailed": 3, "LockNotGranted": 3, "SlotBlocked": 3, "SnapshotLost": 3,
    "SourceChanged": 3, "SpoolGap": 3, "LeaseHeld": 3, "CouldNotCheck": 3, "FenceCalledOff": 3, "RowRefused": 3,
    "RowsHidden": 3, "TextRefused": 3, "FolderFailed": 3, "AuthorityMoving": 3,
    "JavaMissing": 3, "EmbeddedServerFailed": 3, "Interrupted": 130, "ChangeoverError": 3,
}  # fmt: skip


def all_classes(root: type[ChangeoverError] = ChangeoverError) -> list[type[ChangeoverError]]:
    """Return the whole tree below a class, as the module of errors has it."""
    children = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    return [root, *(found for child in children for found in all_classes(child))]


def example(kind: type[ChangeoverError]) -> ChangeoverError:
    """Make an error with a value of its own for every field."""
    values = {"str": "{}", "float": 1.5, "int": 75, "tuple[str, ...]": ("first {}", "second")}
    if "__dataclass_fields__" not in vars(kind):
        return kind("one sentence")
    made = [values[str(f.type)] for f in fields(kind)]  # type: ignore[arg-type]
    return kind(*(v.format(f.name) if isinstance(v, str) else v for v, f in zip(made, fields(kind), strict=True)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", all_classes(), ids=lambda kind: kind.__name__)
def test_a_pickle_round_trip_keeps_everything(kind: type[ChangeoverError]) -> None:
    error = example(kind)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error)
    assert back.exit_code == error.exit_code
    assert getattr(back, "__dict__", None) == error.__dict__


@pytest.mark.parametrize("kind", all_classes(), ids=lambda kind: kind.__name__)
def test_exit_codes_and_sentences(kind: type[ChangeoverError]) -> None:
    assert kind.exit_code == EXIT_CODES[kind.__name__]
    text = str(example(kind))
    assert text
    assert "\n" not in text


def test_every_field_is_in_the_sentence() -> None:
    silent = {"transient"}
    for kind in all_classes():
        if "__dataclass_fields__" in vars(kind):
            for field in fields(kind):  # type: ignore[arg-type]
                value = getattr(example(kind), field.name)
                wanted = value[0] if isinstance(value, tuple) else value if isinstance(value, str) else f"{value:g}"
                assert field.name in silent or wanted in str(example(kind)), f"{kind.__name__}.{field.name}"


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = errors.__doc__ or ""
    for kind in all_classes():
        assert f" {kind.__name__} " in drawn, kind.__name__
    assert set(EXIT_CODES) == {kind.__name__ for kind in all_classes()}
