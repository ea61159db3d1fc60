"""The spec: one TOML file for a migration, as a tree of frozen dataclasses.

Loading refuses what it does not know: an unknown key, a wrong type, a missing key, a password in the file, and whatever
this version does not carry, each by its key or line. A value that starts with ``env:`` names an environment variable; it is
read when the value is used and never kept, printed or hashed.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from changeover.errors import SpecError, UsageError
from changeover.names import joined, qualified
from changeover.secret import Secret, secret
from changeover.spec.document import (
    APPLICATION,
    SLOT,
    STREAM,
    TRIGGER,
    Check,
    DeltaSection,
    Document,
    Flag,
    LedgerSection,
    PostgresSection,
    TableSection,
)
from changeover.spec.reading import read

__all__ = ["APPLICATION", "IDENTIFIER", "SLOT", "STREAM", "TRIGGER", "Check", "Flag", "Source", "Spec", "Table", "Target", "load"]

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

ENCODED = re.compile("%[0-9A-Fa-f]{2}")


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
    def mirrors(self) -> bool:
        """Return whether the application's own process brings writes to the other store, beside the streams."""
        return self.flag is not None and self.flag.mirror == APPLICATION

    @property
    def without_stream(self) -> str:
        """Return, as a part of a sentence, what keeps the old store up to date after the fence where no stream does."""
        keeps = "the router's mirror alone keeps" if self.mirrors else "nothing keeps"
        return f"{keeps} the old store up to date"

    @property
    def slot(self) -> str:
        """Return the name of the replication slot, and of the publication, in the old store."""
        return f"changeover_{self.name}"

    def table(self, name: str) -> Table:
        """Return the table whose source or target bears the name.

        Args:
            name: The source's name, with its schema or without, or the target's.

        Returns:
            The table.

        Raises:
            SpecError: No table bears the name.
        """
        for table in self.tables:
            if name in (table.source, table.target, table.source_relation, table.source_name[1]):
                return table
        raise SpecError(self.path, "table", f"no table is named {name}")


def load(path: str | Path) -> Spec:
    """Read a spec file.

    Args:
        path: The spec's file.

    Returns:
        The spec, every key checked; no secret is resolved.

    Raises:
        SpecError: The file can't be read, or a line or key of it is wrong, which is named.
    """
    text_path = str(path)
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(text_path, "file", f"can't be read ({error.strerror}): `changeover init` writes one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(text_path, "syntax", f"not valid TOML: {error}") from error
    whole: Document = read(text_path, Document, document)
    targets = {name: _target(text_path, name, section) for name, section in whole.target.items()}
    return Spec(
        path=text_path,
        name=whole.name,
        source=Source(secret(text_path, "source.dsn", whole.source.dsn), whole.source.capture),
        targets=targets,
        tables=_tables(text_path, whole.table),
        work=Path(_folder(text_path, "work", whole.work.path)),
        mode=int(whole.work.mode, 8),
        digest=_digest(document),
        ledger=_ledger(text_path, whole.ledger, targets),
        flag=whole.flag and _flag(text_path, whole.flag, targets),
        roles=tuple(dict.fromkeys(whole.application.roles)),
        document=document,
    )


def _digest(document: Mapping[str, Any]) -> str:
    """Return the hash of what a migration is.

    Its checks only ask about it, so a query may be corrected midway; its reverse replication begins at the fence, and may be
    told until then. What is sensitive or private, who may read the work folder, and which roles the application has, changes no
    row.
    """
    left_out = ("check", "reverse", "sensitive")
    tables = [{key: value for key, value in table.items() if key not in left_out} for table in document["table"]]
    work = {key: value for key, value in document["work"].items() if key != "mode"}
    whole = {**document, "table": tables, "work": work}
    whole.pop("application", None)
    if "flag" in document:  # what mirrors is compared by itself: it may change once the tables are loaded
        whole["flag"] = {key: value for key, value in document["flag"].items() if key not in ("mirror", "private")}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _target(path: str, name: str, section: PostgresSection | DeltaSection) -> Target:
    if isinstance(section, PostgresSection):
        return Target(name, "postgres", dsn=secret(path, f"target.{name}.dsn", section.dsn))
    return Target(name, "delta", path=_folder(path, f"target.{name}", section.path))


def _tables(path: str, sections: tuple[TableSection, ...]) -> tuple[Table, ...]:
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
