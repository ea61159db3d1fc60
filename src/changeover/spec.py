"""The spec: one TOML file for a migration, as a tree of frozen dataclasses.

Loading refuses what it does not know: an unknown key, a wrong type, a missing key, a password in the file, and whatever
this version does not carry, each by its key or line. A value that starts with ``env:`` names an environment variable; it is
read when the value is used and never kept, printed or hashed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from changeover.errors import SpecError, UsageError
from changeover.names import joined, qualified
from changeover.secret import Secret, secret

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
"""A migration's name becomes part of a slot's name, whose characters PostgreSQL restricts."""

ENCODED = re.compile("%[0-9A-Fa-f]{2}")

KIND = re.compile(r"[-A-Za-z0-9._]+")
"""A column of tenants is a kind of the flag's contexts, whose letters the SDK restricts."""

MODE = re.compile(r"0?7[0-7]{2}")
"""Rights on the work folder, in octal as chmod has them; its owner has them all."""

SLOT, TRIGGER = CAPTURES = ("slot", "trigger")
"""How changes are captured: by logical decoding, or by triggers that write a log."""


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
class Check:
    """A pair of queries whose results must be equal, each run by its own side's engine."""

    name: str
    source: str
    target: str


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
class Flag:
    """The migration flag: its key, the target that takes over, and the data file of the SDK's file source.

    `context` is the source column whose value is a row's tenant, the flag's context; without it all rows move at once.
    """

    key: str
    target: str
    file: str | None = None
    context: str | None = None


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


def load(path: str | Path) -> Spec:
    """Read a spec file; raises SpecError, naming the line or key."""
    text_path = str(path)
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(text_path, "file", f"can't be read ({error.strerror}): `changeover init` writes one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(text_path, "syntax", f"not valid TOML: {error}") from error
    return _Reader(text_path).spec(document)


NOT_CARRIED = {
    "source.read_from": "bulk reads from a replica are not carried by this version: leave it out, reads go to the primary",
}


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


@dataclass(frozen=True)
class _Reader:
    """Turns the TOML document into the dataclasses, naming each key that is wrong."""

    path: str

    def fail(self, where: str, problem: str) -> NoReturn:
        raise SpecError(self.path, where, problem)

    def only(self, where: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
        prefix = f"{where}." if where else ""
        for key in given:
            if prefix + key in NOT_CARRIED:
                self.fail(prefix + key, NOT_CARRIED[prefix + key])
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
                self.fail(prefix + key, f"unknown key: {hint}")

    def text(self, where: str, given: Mapping[str, Any], key: str) -> str:
        if key not in given:
            self.fail(f"{where}.{key}".lstrip("."), "is missing")
        return self.optional_text(where, given, key) or self.fail(f"{where}.{key}".lstrip("."), "is empty")

    def optional_text(self, where: str, given: Mapping[str, Any], key: str) -> str | None:
        value = given.get(key)
        if value is not None and not isinstance(value, str):
            self.fail(f"{where}.{key}".lstrip("."), f"must be a string, not {type(value).__name__}")
        return value

    def texts(self, where: str, given: Mapping[str, Any], key: str) -> tuple[str, ...]:
        value = given.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            self.fail(f"{where}.{key}", "must be a list of names")
        return tuple(value)

    def section(self, where: str, given: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        if key not in given:
            self.fail(f"{where}.{key}".lstrip("."), "is missing")
        value = given[key]
        if not isinstance(value, dict):
            self.fail(f"{where}.{key}".lstrip("."), "must be a section")
        return value

    def secret(self, where: str, given: Mapping[str, Any], key: str = "dsn") -> Secret:
        return secret(self.path, f"{where}.{key}", self.text(where, given, key))

    def spec(self, document: Mapping[str, Any]) -> Spec:
        self.only("", document, ("name", "source", "target", "table", "flag", "application", "work", "ledger"))
        name = self.text("", document, "name")
        if not NAME.fullmatch(name):
            self.fail("name", "must be lower-case letters, digits and underscores, begin with a letter, 40 at most")
        targets = self.targets(self.section("", document, "target"))
        return Spec(
            path=self.path,
            name=name,
            source=self.source(self.section("", document, "source")),
            targets=targets,
            tables=self.tables(document.get("table")),
            work=Path(self.work(self.section("", document, "work"))),
            mode=self.mode(document["work"]),
            digest=_digest(document),
            ledger=self.ledger(document, targets),
            flag=self.flag(document, targets),
            roles=self.roles(document),
            document=document,
        )

    def source(self, given: Mapping[str, Any]) -> Source:
        self.only("source", given, ("dsn", "capture"))
        capture = self.optional_text("source", given, "capture") or SLOT
        if capture not in CAPTURES:
            self.fail("source.capture", f'is "{capture}": it may be {" or ".join(CAPTURES)}')
        return Source(self.secret("source", given), capture)

    def targets(self, given: Mapping[str, Any]) -> dict[str, Target]:
        if not given:
            self.fail("target", "needs at least one [target.NAME] section")
        return {name: self.target(name, self.section("target", given, name)) for name in given}

    def target(self, name: str, given: Mapping[str, Any]) -> Target:
        where = f"target.{name}"
        if not NAME.fullmatch(name):
            self.fail(where, "a target's name is lower-case letters, digits and underscores")
        kind = self.text(where, given, "kind")
        if kind == "postgres":
            self.only(where, given, ("kind", "dsn"))
            return Target(name, kind, dsn=self.secret(where, given))
        if kind == "delta":
            self.only(where, given, ("kind", "path"))
            return Target(name, kind, path=self.folder(where, given))
        self.fail(f"{where}.kind", f'is "{kind}": known are "postgres" and "delta"')

    def tables(self, given: Any) -> tuple[Table, ...]:
        if not isinstance(given, list) or not given:
            self.fail("table", "needs at least one [[table]] section")
        tables = tuple(self.table(f"table[{index}]", item) for index, item in enumerate(given))
        # a Delta target's folder is named by the table alone
        for label, names in (
            ("source", [t.source_relation for t in tables]), ("target", [t.target_name[1] for t in tables]),
        ):  # fmt: skip
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                self.fail("table", f"{label} {sorted(twice)[0]} stands in two [[table]] sections")
        return tables

    def table(self, where: str, given: Mapping[str, Any]) -> Table:
        known = ("source", "target", "key", "columns", "drop", "where", "transform", "check", "reverse", "sensitive")
        self.only(where, given, known)
        key = self.texts(where, given, "key")
        if not key:
            self.fail(f"{where}.key", "is missing: name the target's key columns")
        columns = self.expressions(where, given, "columns")
        transform = self.section(where, {"transform": {}, **given}, "transform")
        self.only(f"{where}.transform", transform, ("function",))
        function = self.optional_text(f"{where}.transform", transform, "function")
        if function is not None and not re.fullmatch(r"[\w.]+:\w+", function):
            self.fail(f"{where}.transform.function", 'must be "package.module:function"')
        return Table(
            source=self.table_name(where, given, "source"),
            target=self.table_name(where, given, "target"),
            key=key,
            columns=dict(columns),
            drop=self.texts(where, given, "drop"),
            where=self.optional_text(where, given, "where"),
            function=function,
            checks=tuple(self.check(f"{where}.check[{i}]", item) for i, item in enumerate(given.get("check", []))),
            reverse=dict(self.expressions(where, given, "reverse")),
            sensitive=self.texts(where, given, "sensitive"),
        )

    def table_name(self, where: str, given: Mapping[str, Any], key: str) -> str:
        """Return the name of a table, which `qualified` reads."""
        name = self.text(where, given, key)
        try:
            qualified(name)
        except UsageError as error:
            self.fail(f"{where}.{key}", str(error))
        return name

    def expressions(self, where: str, given: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """Return a section of columns and the expression that fills each, empty where it is left out."""
        section = self.section(where, {key: {}, **given}, key)
        for column in section:
            self.text(f"{where}.{key}", section, column)
        return section

    def check(self, where: str, given: Mapping[str, Any]) -> Check:
        self.only(where, given, ("name", "source", "target"))
        return Check(*(self.text(where, given, key) for key in ("name", "source", "target")))

    def flag(self, document: Mapping[str, Any], targets: Mapping[str, Target]) -> Flag | None:
        if "flag" not in document:
            return None
        given = self.section("", document, "flag")
        self.only("flag", given, ("key", "target", "file", "context"))
        target = self.text("flag", given, "target")
        if target not in targets:
            self.fail("flag.target", f'is "{target}": the targets are {", ".join(targets)}')
        if targets[target].kind != "postgres":
            self.fail("flag.target", "must be a PostgreSQL target: an application writes to the store that takes over")
        file, context = self.optional_text("flag", given, "file"), self.optional_text("flag", given, "context")
        if context is not None and not (KIND.fullmatch(context) and context not in ("kind", "multi")):
            self.fail("flag.context", f'is "{context}": LaunchDarkly has no kind of context by that name')
        return Flag(self.text("flag", given, "key"), target, self.beside(file) if file else None, context)

    def roles(self, document: Mapping[str, Any]) -> tuple[str, ...]:
        if "application" not in document:
            return ()
        given = self.section("", document, "application")
        self.only("application", given, ("roles",))
        return tuple(dict.fromkeys(self.texts("application", given, "roles")))

    def work(self, given: Mapping[str, Any]) -> str:
        self.only("work", given, ("path", "mode"))
        return self.folder("work", given)

    def mode(self, given: Mapping[str, Any]) -> int:
        mode = self.text("work", {"mode": "0700", **given}, "mode")
        if not MODE.fullmatch(mode):
            self.fail("work.mode", f'is "{mode}": write rights in octal that leave all to the owner, such as "0750"')
        return int(mode, 8)

    def folder(self, where: str, given: Mapping[str, Any]) -> str:
        """Return a folder of Delta tables; delta-rs reads what looks like a percent-encoded character as that character."""
        path = self.beside(self.text(where, given, "path"))
        if met := ENCODED.search(path):
            self.fail(f"{where}.path", f"has {met[0]} in it ({path}), which Delta reads as another character: name another folder")
        return path

    def beside(self, path: str) -> str:
        """Return a path of the file's, absolute: whoever runs a command, and from where, means the same folder."""
        return str(Path(self.path).absolute().parent / path)

    def ledger(self, document: Mapping[str, Any], targets: Mapping[str, Target]) -> Secret:
        """The ledger stands beside the tables that it guards: in the flag's target, or else the first PostgreSQL one."""
        if "ledger" in document:
            given = self.section("", document, "ledger")
            self.only("ledger", given, ("dsn",))
            if any(target.kind == "postgres" for target in targets.values()):
                self.fail("ledger", "stands beside the PostgreSQL target by itself: leave the section out")
            return self.secret("ledger", given)
        stores = [target.dsn for target in targets.values() if target.dsn is not None]
        if not stores:
            self.fail("ledger.dsn", "is missing: no target is PostgreSQL, so name a database for the ledger")
        if len(stores) > 1:
            self.fail("target", "more than one PostgreSQL target is not carried by this version")
        return stores[0]
