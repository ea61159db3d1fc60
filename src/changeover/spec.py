"""The spec: one TOML file for a migration, as a tree of frozen dataclasses.

Models say what the file may hold. They read it, and `src/changeover/spec.schema.json` is generated from them. Loading refuses
an unknown key, a wrong type, a missing key, a password in the file and what this version does not carry, each by its key.
A value that starts with ``env:`` names an environment variable. It is read when it is used and never kept, printed or hashed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from msgspec import Meta, Struct, ValidationError, convert
from msgspec.structs import replace

from changeover.errors import SpecError, UsageError
from changeover.names import joined, qualified
from changeover.secret import Secret, secret

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

ENCODED = re.compile("%[0-9A-Fa-f]{2}")

SLOT, TRIGGER = ("slot", "trigger")
"""How changes are captured: by logical decoding, or by triggers that write a log."""


def _rule(pattern: str, problem: str, least: int = 0) -> Meta:
    """Return the rule that a text matches the whole pattern, with the sentence for one that does not.

    The pattern ends where nothing follows: `$` would let a line break pass in Python.
    """
    return Meta(pattern=rf"^(?:{pattern})(?![\s\S])", extra={"problem": problem}, min_length=least)


Text = Annotated[str, Meta(min_length=1)]
Names = Annotated[tuple[Text, ...], Meta(extra={"problem": "must be a list of names"})]
Expressions = dict[str, Text]

# A migration's name becomes part of a slot's name, whose characters PostgreSQL restricts.
Name = Annotated[
    str,
    _rule(
        "[a-z][a-z0-9_]{0,39}",
        "must be lower-case letters, digits and underscores, begin with a letter, 40 at most",
        least=1,
    ),
]
Function = Annotated[str, _rule(r"[\w.]+:\w+", 'must be "package.module:function"')]

# A column of tenants is a kind of the flag's contexts, whose letters the SDK restricts.
Kind = Annotated[
    str,
    _rule(
        r"(?!(?:kind|multi)(?![\s\S]))[-A-Za-z0-9._]+",
        'is "{}": LaunchDarkly has no kind of context by that name',
    ),
]

# Rights on the work folder, in octal as chmod has them; its owner has them all.
Rights = Annotated[
    str,
    _rule("0?7[0-7]{2}", 'is "{}": write rights in octal that leave all to the owner, such as "0750"'),
]
Capture = Annotated[Literal["slot", "trigger"], Meta(extra={"problem": 'is "{}": it may be slot or trigger'})]


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """A section of the file, which holds the keys that it names and no others."""


@dataclass(frozen=True)
class Source:
    """The old store, a PostgreSQL database, reached by a direct connection."""

    dsn: Secret
    capture: str = SLOT


@dataclass(frozen=True)
class Target:
    """A new store: `kind` is postgres (with `dsn`) or delta (with `path`, absolute)."""

    name: str
    kind: str
    dsn: Secret | None = None
    path: str | None = None

    @property
    def dsn_value(self) -> str:
        """Return the DSN of a PostgreSQL target."""
        if self.dsn is None:
            raise TypeError(f"target {self.name} is of kind {self.kind} and has no DSN")
        return self.dsn.resolve()

    @property
    def folder(self) -> Path:
        """Return the folder of a Delta target."""
        if self.path is None:
            raise TypeError(f"target {self.name} is of kind {self.kind} and has no path")
        return Path(self.path)


@dataclass(frozen=True)
class Table:
    """One table: where it comes from, where it goes, and how a row changes on the way.

    `reverse` are the source's columns as Spark SQL expressions over the target's row, for reverse replication. `sensitive` are
    source columns whose values are shown nowhere, nor what is computed from them (`changeover.jobs.transform.masking`).
    """

    source: str
    target: str
    key: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    where: str | None = None
    function: str | None = None
    checks: tuple[Check, ...] = ()
    reverse: Mapping[str, str] = field(default_factory=dict)
    sensitive: tuple[str, ...] = ()

    @property
    def source_name(self) -> tuple[str, str]:
        """Return schema and name of the source table."""
        return qualified(self.source)

    @property
    def target_name(self) -> tuple[str, str]:
        """Return schema and name of the target table (of a Delta target the name alone is the folder)."""
        return qualified(self.target)

    @property
    def source_relation(self) -> str:
        """Return the source table's name in the one spelling in which it stands in spools and on record."""
        return joined(*self.source_name)

    @property
    def target_relation(self) -> str:
        """Return the target table's name in that spelling."""
        return joined(*self.target_name)


@dataclass(frozen=True)
class Spec:
    """A whole migration; `digest` is the hash of what the file says, without checks and any secret's value.

    Paths are absolute: those of the file are relative to its own folder. `mode` is what others may do in folders of ours.
    """

    path: str
    name: str
    source: Source
    targets: Mapping[str, Target]
    tables: tuple[Table, ...]
    work: Path
    digest: str
    ledger: Secret
    flag: Flag | None = None
    roles: tuple[str, ...] = ()
    """The roles by which the application uses the stores."""
    document: Mapping[str, Any] = field(default_factory=dict)
    mode: int = 0o700

    @property
    def slot(self) -> str:
        """Return the name of the replication slot, and of the publication, in the old store."""
        return f"changeover_{self.name}"

    def table(self, name: str) -> Table:
        """Return the table whose source or target bears the name."""
        for table in self.tables:
            if name in (table.source, table.target, table.source_relation, table.source_name[1]):
                return table
        raise SpecError(self.path, "table", f"no table is named {name}")


class Check(Section, frozen=True):
    """A pair of queries whose results must be equal, each run by its own side's engine."""

    name: Text
    source: Text
    target: Text


class Flag(Section, frozen=True):
    """The migration flag: its key, the target that takes over, and the data file of the SDK's file source.

    `context` is the source column whose value is a row's tenant, the flag's context; without it all rows move at once.
    """

    key: Text
    target: Text
    file: str | None = None
    context: Kind | None = None


class SourceSection(Section, frozen=True):
    """The old store's section, `[source]`."""

    dsn: Text
    capture: Capture = "slot"


class PostgresSection(Section, frozen=True, tag_field="kind", tag="postgres"):
    """A target's section, `[target.NAME]`, of a PostgreSQL store."""

    dsn: Text


class DeltaSection(Section, frozen=True, tag_field="kind", tag="delta"):
    """A target's section, `[target.NAME]`, of Delta tables in a folder."""

    path: Text


class TransformSection(Section, frozen=True):
    """A table's section, `[table.transform]`: a function that changes its frame."""

    function: Function | None = None


class TableSection(Section, frozen=True):
    """A table's section, `[[table]]`."""

    source: Text
    target: Text
    key: Annotated[Names, Meta(min_length=1, extra={"problem": "must be a list of names: name the target's key columns"})]
    columns: Expressions = {}
    drop: Names = ()
    where: str | None = None
    transform: TransformSection = TransformSection()
    check: Annotated[tuple[Check, ...], Meta(extra={"problem": "must be [[table.check]] sections"})] = ()
    reverse: Expressions = {}
    sensitive: Names = ()


class ApplicationSection(Section, frozen=True):
    """The application's section, `[application]`: the roles by which it uses the stores."""

    roles: Names = ()


class WorkSection(Section, frozen=True):
    """The section of the work folder, `[work]`, and of what others may do in it."""

    path: Text
    mode: Rights = "0700"


class LedgerSection(Section, frozen=True):
    """The ledger's section, `[ledger]`, where no target is a PostgreSQL store."""

    dsn: Text


TargetSection = Annotated[
    PostgresSection | DeltaSection, Meta(extra={"problem": 'is "{0[kind]}": known are "postgres" and "delta"'})
]


class Document(Section, frozen=True):
    """A spec file of changeover."""

    name: Name
    source: SourceSection
    target: Annotated[dict[Name, TargetSection], Meta(min_length=1, extra={"problem": "needs at least one [target.NAME] section"})]
    table: Annotated[list[TableSection], Meta(min_length=1, extra={"problem": "needs at least one [[table]] section"})]
    work: WorkSection
    flag: Flag | None = None
    application: ApplicationSection = ApplicationSection()
    ledger: LedgerSection | None = None


def load(path: str | Path) -> Spec:
    """Read a spec file; raises SpecError, naming the line or key."""
    text_path = str(path)
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(text_path, "file", f"can't be read ({error.strerror}): `changeover init` writes one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(text_path, "syntax", f"not valid TOML: {error}") from error
    found: Document = _read(text_path, Document, document)
    targets = {name: _target(text_path, name, section) for name, section in found.target.items()}
    return Spec(
        path=text_path,
        name=found.name,
        source=Source(secret(text_path, "source.dsn", found.source.dsn), found.source.capture),
        targets=targets,
        tables=_tables(text_path, found.table),
        work=Path(_folder(text_path, "work", found.work.path)),
        mode=int(found.work.mode, 8),
        digest=_digest(document),
        ledger=_ledger(text_path, found.ledger, targets),
        flag=found.flag and _flag(text_path, found.flag, targets),
        roles=tuple(dict.fromkeys(found.application.roles)),
        document=document,
    )


def _digest(document: Mapping[str, Any]) -> str:
    """Return the hash of what a migration is.

    Its checks only ask about it, so a query may be corrected midway; its reverse replication begins at the fence, and may be
    told until then. What is sensitive, who may read the work folder, and which roles the application has, changes no row.
    """
    left_out = ("check", "reverse", "sensitive")
    tables = [{key: value for key, value in table.items() if key not in left_out} for table in document["table"]]
    work = {key: value for key, value in document["work"].items() if key != "mode"}
    whole = {**document, "table": tables, "work": work}
    whole.pop("application", None)
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:16]


NOT_CARRIED = {
    "source.read_from": "bulk reads from a replica are not carried by this version: leave it out, reads go to the primary",
}


def _read(path: str, model: Any, given: Any, where: str = "") -> Any:
    """Return what a model makes of a value. Raises SpecError, which names the innermost part that its own model refuses."""
    try:
        return convert(given, model)
    except ValidationError as error:
        for key, part_model, part in _parts(model, given):
            _read(path, part_model, part, (where + key).removeprefix("."))
        said, _, below = str(error).partition(" - at `$")
        field = said.split("`")[1] if said.startswith("Object") else below.removeprefix(".").removesuffix("`")
        where = f"{where}.{field}".strip(".")
        raise SpecError(path, where, NOT_CARRIED.get(where) or _problem(model, given, said, field)) from error


def _problem(model: Any, given: Any, said: str, field: str) -> str:
    """Return in a sentence what a model has against a value, where msgspec `said` so of the value or a `field` of it."""
    if said.startswith("Object missing"):
        return f"is missing: {_meta(_fields(model).get(field), 'description') or 'it says what the section is about'}"
    if said.startswith("Object contains unknown"):
        near = difflib.get_close_matches(field, _fields(model), n=1)
        return "unknown key: " + (f"did you mean {near[0]}?" if near else f"known here: {', '.join(_fields(model))}")
    if said.startswith("Expected `object"):
        return "must be a section"
    if said.startswith("Expected `str") and ", got" in said:
        return f"must be a string, not {type(given).__name__}"
    if given == "" and "length" in said:
        return "is empty"
    return str((_meta(model, "extra") or {"problem": said})["problem"]).format(given)


def _parts(model: Any, given: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the parts of a value that its model knows, each with its key and its own model."""
    model = model.__origin__ if get_origin(model) is Annotated else model
    origin, models = get_origin(model), get_args(model)
    if origin in (list, tuple) and isinstance(given, list):
        yield from ((f"[{index}]", models[0], part) for index, part in enumerate(given))
    elif origin is dict and isinstance(given, dict):
        for key, part in given.items():
            yield from ((f".{key}", models[0], key), (f".{key}", models[1], part))
    elif origin in (Union, UnionType):
        kind = given.get("kind") if isinstance(given, dict) else None
        yield from (("", one, given) for one in models if _tag(one) in (None, kind))
    elif isinstance(given, dict):
        yield from ((f".{key}", part, given[key]) for key, part in _fields(model).items() if key in given)


def _fields(model: Any) -> dict[str, Any]:
    """Return the keys of a section, each with its model; none of what is no section."""
    if not (isinstance(model, type) and issubclass(model, Section)):
        return {}
    tag = model.__struct_config__.tag_field
    return {**({tag: str} if tag else {}), **get_type_hints(model, include_extras=True)}


def _meta(model: Any, name: str) -> Any:
    """Return what a model's outermost annotation says under a name, or nothing."""
    return next((said for meta in reversed(getattr(model, "__metadata__", ())) if (said := getattr(meta, name))), None)


def _tag(model: Any) -> str | None:
    """Return by which kind of target a section is chosen."""
    return getattr(getattr(model, "__struct_config__", None), "tag", None)


def _target(path: str, name: str, section: PostgresSection | DeltaSection) -> Target:
    if isinstance(section, PostgresSection):
        return Target(name, "postgres", dsn=secret(path, f"target.{name}.dsn", section.dsn))
    return Target(name, "delta", path=_folder(path, f"target.{name}", section.path))


def _tables(path: str, sections: list[TableSection]) -> tuple[Table, ...]:
    """Return the tables, of which no two have one source, nor one folder in a Delta target, which the table alone names."""
    taken: dict[tuple[str, str], int] = {}
    for index, section in enumerate(sections):
        for side, name in (("source", section.source), ("target", section.target)):
            try:
                names = qualified(name)
            except UsageError as error:
                raise SpecError(path, f"table[{index}].{side}", str(error)) from error
            only = joined(*names) if side == "source" else names[1]
            if taken.setdefault((side, only), index) != index:
                raise SpecError(path, "table", f"{side} {only} stands in two [[table]] sections")
    return tuple(
        Table(t.source, t.target, t.key, t.columns, t.drop, t.where, t.transform.function, t.check, t.reverse, t.sensitive)
        for t in sections
    )


def _flag(path: str, flag: Flag, targets: Mapping[str, Target]) -> Flag:
    if flag.target not in targets:
        raise SpecError(path, "flag.target", f'is "{flag.target}": the targets are {", ".join(targets)}')
    if targets[flag.target].kind != "postgres":
        problem = "must be a PostgreSQL target: an application writes to the store that takes over"
        raise SpecError(path, "flag.target", problem)
    return replace(flag, file=_beside(path, flag.file) if flag.file else None)


def _folder(path: str, where: str, given: str) -> str:
    """Return a folder of Delta tables; delta-rs reads what looks like a percent-encoded character as that character."""
    folder = _beside(path, given)
    if met := ENCODED.search(folder):
        problem = f"has {met[0]} in it ({folder}), which Delta reads as another character: name another folder"
        raise SpecError(path, f"{where}.path", problem)
    return folder


def _beside(path: str, given: str) -> str:
    """Return a path of the file's, absolute: whoever runs a command, and from where, means the same folder."""
    return str(Path(path).absolute().parent / given)


def _ledger(path: str, section: LedgerSection | None, targets: Mapping[str, Target]) -> Secret:
    """Return where the ledger is: beside the tables that it guards, or in a database of its own for a lake alone."""
    stores = [target.dsn for target in targets.values() if target.dsn is not None]
    if stores and section:
        raise SpecError(path, "ledger", "stands beside the PostgreSQL target by itself: leave the section out")
    if section:
        return secret(path, "ledger.dsn", section.dsn)
    if not stores:
        raise SpecError(path, "ledger.dsn", "is missing: no target is PostgreSQL, so name a database for the ledger")
    if len(stores) > 1:
        raise SpecError(path, "target", "more than one PostgreSQL target is not carried by this version")
    return stores[0]
