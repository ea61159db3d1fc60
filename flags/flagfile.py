"""The flag in a file: a migration flag as JSON, read by the SDK's own file data source, moved by replacing the file.

A replacement is atomic and durable: a reader sees the file before or after, never between, and a write that returned
survives a crash. Each one raises the flag's version and has a modification time above its predecessor's, because the
SDK notices a change by that time alone. Two processes that write at once wait for each other. Nothing else in the file
changes. Tenants are switched as LaunchDarkly's own console does it, by individual targets of their kind of context.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from ldclient import Context, LDClient
from ldclient.config import Config
from ldclient.integrations import Files
from ldclient.interfaces import FeatureStore, UpdateProcessor
from ldclient.migrations.types import Origin, Stage

from changeover.errors import SpecError
from changeover.flags.stages import ORDER, TABLE

POLL_SECONDS = 0.2
SDK_KEY = "flag-file"
"""The SDK asks for a key of some kind; with a file as data source and no events it goes nowhere."""

VARIATIONS = [stage.value for stage in ORDER]
PERCENT = 1_000
"""LaunchDarkly's weights are thousandths of a percent."""

MTIME_STEP_NS = 1_000_000
"""Least distance between two versions' modification times: a file system keeps it, a float tells it."""


def read_stage(path: str | Path, key: str) -> Stage:
    """Return the stage that a flag asks of everyone.

    Of a percentage rollout over tenants that is the first of its variations, as for any context of
    another kind.

    Args:
        path: The flag file.
        key: The flag's key.

    Returns:
        The stage.

    Raises:
        SpecError: The file can't be read, or what it asks is no stage.
    """
    flag = read_flag(path, key)
    index = _asked(flag.get("fallthrough", {})) if flag.get("on") else flag.get("offVariation")
    variations = flag.get("variations", [])
    value = variations[index] if isinstance(index, int) and 0 <= index < len(variations) else None
    stage = Stage.from_str(value) if isinstance(value, str) else None
    if stage is None:
        raise SpecError(
            str(path),
            f"flags.{key}",
            f"its variation is {value!r}, which is no stage: known are {', '.join(VARIATIONS)}",
        )
    return stage


def read_stages(path: str | Path, key: str) -> frozenset[Stage]:
    """Return the stages that a flag has: LaunchDarkly's migration flags have six, four, three or two.

    Args:
        path: The flag file.
        key: The flag's key.

    Returns:
        The stages among its variations.

    Raises:
        SpecError: The file can't be read, or has no such flag.
    """
    found = map(Stage.from_str, filter(VARIATIONS.__contains__, read_flag(path, key).get("variations", [])))
    return frozenset(stage for stage in found if stage is not None)


def read_flag(path: str | Path, key: str) -> dict[str, Any]:
    """Return a flag as the file has it.

    Args:
        path: The flag file.
        key: The flag's key.

    Returns:
        The flag's own object.

    Raises:
        SpecError: The file can't be read, or has no such flag.
    """
    return _flag(_load(Path(path)), path, key)


def write_stage(path: str | Path, key: str, stage: Stage, kind: str | None = None) -> int:
    """Make a flag ask for a stage, creating flag and file where missing; return the flag's new version.

    With a `kind` of context no tenant is asked for anything else from now on.

    Args:
        path: The flag file.
        key: The flag's key.
        stage: The stage that it asks for.
        kind: The kind of context that tenants are; None leaves individual targets alone.

    Returns:
        The flag's new version, counted from 1.

    Raises:
        SpecError: The file is there and is no flag file; what can't be read is never overwritten.
        OSError: The folder can't be written.
    """
    target = Path(path)
    with _folder_locked(target.parent) as folder:
        document = _load(target) if target.exists() else {}
        flag = document.setdefault("flags", {}).setdefault(key, {"key": key, "version": 0, "salt": key})
        if not flag.get("variations"):
            flag.update(variations=VARIATIONS, offVariation=0)
        flag.setdefault("migration", {})
        # a flag's own variations stay as they are: targets and rules name them by their place
        flag.update(version=int(flag.get("version", 0)) + 1, on=True, fallthrough={"variation": _variation(flag, path, key, stage)})
        if kind is not None:
            _aim(flag, kind, None, None)
        _put(target, document, folder)
    return int(flag["version"])


def write_tenants(path: str | Path, key: str, kind: str, tenants: Collection[str], stage: Stage) -> int:
    """Make a flag ask for a stage of some tenants, contexts of a `kind`; return the flag's new version.

    They are individual targets then, or none where everybody is asked for that stage anyway.

    Args:
        path: The flag file.
        key: The flag's key.
        kind: The kind of context that tenants are.
        tenants: The tenants' keys, as texts.
        stage: The stage that it asks of them.

    Returns:
        The flag's new version.

    Raises:
        SpecError: The flag is switched off, which asks the same of all, or it lacks the stage.
        OSError: The folder can't be written.
    """
    target = Path(path)
    with _folder_locked(target.parent) as folder:
        document = _load(target)
        flag = _flag(document, path, key)
        if not flag.get("on"):
            raise SpecError(str(path), f"flags.{key}", "is switched off, so it asks the same of all: switch it on")
        index = _variation(flag, path, key, stage)
        everybodys = flag.get("fallthrough") == {"variation": index} and not flag.get("rules")
        flag["version"] = int(flag.get("version", 0)) + 1
        _aim(flag, kind, frozenset(tenants), None if everybodys else index)
        _put(target, document, folder)
    return int(flag["version"])


def read_reads(path: str | Path, key: str) -> int:
    """Return the percentage of contexts that a flag serves live or above by a rollout.

    Args:
        path: The flag file.
        key: The flag's key.

    Returns:
        The percentage, 0 without a rollout.

    Raises:
        SpecError: The file can't be read, or has no such flag.
    """
    flag = read_flag(path, key)
    weighted = flag.get("fallthrough", {}).get("rollout", {}).get("variations", []) if flag.get("on") else []
    moved = {index for index, name in enumerate(flag.get("variations", [])) if (s := Stage.from_str(name)) and _reads_new(s)}
    return round(sum(int(one.get("weight", 0)) for one in weighted if one.get("variation") in moved) / PERCENT)


def _reads_new(stage: Stage) -> bool:
    return TABLE[stage].reads is Origin.NEW


def write_reads(path: str | Path, key: str, percent: int) -> int:
    """Make a flag serve live to a percentage of users, and to all others what it serves them now; return its new version.

    Args:
        path: The flag file.
        key: The flag's key.
        percent: The percentage; 0 ends the rollout.

    Returns:
        The flag's new version.

    Raises:
        SpecError: The file can't be read, or has no such flag, or the flag lacks the stage live.
        OSError: The folder can't be written.
    """
    target = Path(path)
    with _folder_locked(target.parent) as folder:
        document = _load(target)
        flag = _flag(document, path, key)
        others = _asked(flag.get("fallthrough", {}))
        weights = [
            {"variation": others, "weight": (100 - percent) * PERCENT},
            {"variation": _variation(flag, path, key, Stage.LIVE), "weight": percent * PERCENT},
        ]
        rollout = {"contextKind": Context.DEFAULT_KIND, "variations": weights}
        flag["fallthrough"] = {"rollout": rollout} if percent else {"variation": others}
        flag["version"] = int(flag.get("version", 0)) + 1
        _put(target, document, folder)
    return int(flag["version"])


def write_flag(path: str | Path, key: str, former: dict[str, Any]) -> int:
    """Put a flag back as `read_flag` had it; return its new version, above those that there were meanwhile.

    Args:
        path: The flag file.
        key: The flag's key.
        former: What `read_flag` returned.

    Returns:
        The flag's new version.

    Raises:
        SpecError: The file can't be read, or has no such flag.
    """
    target = Path(path)
    with _folder_locked(target.parent) as folder:
        document = _load(target)
        version = int(_flag(document, path, key).get("version", 0)) + 1
        document["flags"][key] = {**former, "version": version}
        _put(target, document, folder)
    return version


def _variation(flag: dict[str, Any], path: str | Path, key: str, stage: Stage) -> int:
    """Return the place of a stage among a flag's variations."""
    variations: list[Any] = flag.get("variations", [])
    if stage.value not in variations:
        raise SpecError(str(path), f"flags.{key}", f"has no variation {stage.value}: it has {', '.join(map(str, variations))}")
    return variations.index(stage.value)


def _asked(fallthrough: dict[str, Any]) -> Any:
    """Return the variation for a context that no target and no rule is for."""
    weighted = fallthrough.get("rollout", {}).get("variations") or [{}]
    return fallthrough.get("variation", weighted[0].get("variation"))


def _aim(flag: dict[str, Any], kind: str, tenants: frozenset[str] | None, variation: int | None) -> None:
    """Take tenants (all: None) off a flag's individual targets, and make them those of a variation, unless that is None.

    The SDK keeps those of the kind "user" in a list of their own, which it reads by itself only while the other list is empty.
    """
    plain = kind == Context.DEFAULT_KIND
    every: list[dict[str, Any]] = flag.setdefault("targets" if plain else "contextTargets", [])
    ours = [target for target in every if plain or target.get("contextKind") == kind]
    for target in ours:
        target["values"] = [rule for rule in target.get("values", []) if tenants is not None and rule not in tenants]
    if variation is not None:
        own = next((target for target in ours if target.get("variation") == variation), None)
        if own is None:
            own = {**({} if plain else {"contextKind": kind}), "values": [], "variation": variation}
            every.append(own)
        own["values"] += sorted(tenants or ())
    every[:] = [target for target in every if target["values"] or not any(target is rule for rule in ours)]
    contexts: list[dict[str, Any]] = flag.setdefault("contextTargets", [])
    known = {rule.get("variation") for rule in contexts if rule.get("contextKind") == Context.DEFAULT_KIND}
    if contexts:
        contexts += [
            {"contextKind": Context.DEFAULT_KIND, "values": [], "variation": target["variation"]}
            for target in flag.get("targets", [])
            if target["variation"] not in known
        ]


def client(path: str | Path, poll_seconds: float = POLL_SECONDS) -> LDClient:
    """Return an SDK client that follows the file within `poll_seconds`; the caller closes it (application).

    It never connects anywhere. `offline` would ignore the file; watching by `watchdog` would reload
    without end and miss renames.

    Args:
        path: The flag file.
        poll_seconds: After how many seconds at most a change is seen.

    Returns:
        The client, whose threads run until it is closed.
    """
    return LDClient(
        Config(
            SDK_KEY,
            update_processor_class=lambda config, store, ready: FileSource(path, poll_seconds, config, store, ready),
            send_events=False,
            diagnostic_opt_out=True,
        )
    )


@contextmanager
def loaded(path: str | Path) -> Iterator[LDClient]:
    """Lend an SDK client of the file as it is now, which follows nothing.

    Args:
        path: The flag file.

    Yields:
        The client, closed when the block ends.
    """
    source = Files.new_data_source([str(path)])
    held = LDClient(Config(SDK_KEY, update_processor_class=source, send_events=False, diagnostic_opt_out=True))
    try:
        yield held
    finally:
        held.close()  # type: ignore[no-untyped-call]


class FileSource(UpdateProcessor):
    """The SDK's polling file source, started such that no replacement is missed (each process, a forked child's too).

    The SDK loads the file first and notes its time afterwards. It would never see a replacement
    between the two, and the process would keep its first stage until the next one. So a start
    during which the file changed is done again.
    """

    def __init__(self, path: str | Path, poll_seconds: float, config: Config, store: FeatureStore, ready: Event) -> None:
        self._path = path
        build = Files.new_data_source([str(path)], auto_update=True, poll_interval=poll_seconds, force_polling=True)
        if build is None:
            raise TypeError("the SDK has no file data source")
        self._make: Callable[[], UpdateProcessor] = lambda: build(config, store, ready)
        self._source = self._make()

    def start(self) -> None:
        """Load and follow the file."""
        while True:
            before = _modified(self._path)
            self._source.start()  # type: ignore[no-untyped-call]
            if _modified(self._path) == before:
                return
            self._source.stop()  # type: ignore[no-untyped-call]
            self._source = self._make()

    def stop(self) -> None:
        """Stop following."""
        self._source.stop()  # type: ignore[no-untyped-call]

    def initialized(self) -> bool:
        """Return whether the file was loaded."""
        return bool(self._source.initialized())


def _modified(path: str | Path) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return None


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(str(path), "file", f"can't be read ({error.strerror}): name the flag's data file") from error
    except ValueError as error:
        raise SpecError(str(path), "syntax", f"not valid JSON ({error}): correct it or restore it") from error
    if not isinstance(document, dict) or not isinstance(document.get("flags", {}), dict):
        raise SpecError(str(path), "flags", "must be an object with one entry per flag")
    return document


def _flag(document: dict[str, Any], path: str | Path, key: str) -> dict[str, Any]:
    flag = document.get("flags", {}).get(key)
    if not isinstance(flag, dict):
        known = ", ".join(sorted(document.get("flags", {}))) or "none"
        raise SpecError(str(path), "flags", f"there is no flag {key}: the file has {known}")
    return flag


def _put(target: Path, document: dict[str, Any], folder: int) -> None:
    _replace(target, json.dumps(document, indent=2) + "\n")
    os.fsync(folder)


@contextmanager
def _folder_locked(folder: Path) -> Iterator[int]:
    """Hold the folder's lock: the file itself is replaced, so a lock on it would be a lock on a file that is gone."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _replace(target: Path, text: str) -> None:
    name = target.parent / f".{target.name}.{secrets.token_hex(8)}"
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the umask decides who reads a new file
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            previous = target.stat() if target.exists() else None
            if previous is not None:
                os.fchmod(file.fileno(), previous.st_mode & 0o777)
                now = os.fstat(file.fileno()).st_mtime_ns
                later = max(now, previous.st_mtime_ns + MTIME_STEP_NS)
                os.utime(file.fileno(), ns=(later, later))
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
