"""The reference pages that are generated: command line, spec, errors, Python and settings.

    python docs/generate.py

Each page is a function of the repository alone, so a test can make it anew and compare. What the code does not say (the meaning of
an argument, of an exit code) is written here; what to do about an error is read from a page. A name without its text is a KeyError.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click

from changeover import errors, settings
from changeover.cli.command import HELP
from changeover.cli.demo import main as demo
from changeover.cli.main import main
from changeover.spark.jars import JarsMissing

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs/reference"
WIDTH = 88
"""Characters of a signature on one line; a longer one has a line for each parameter."""


def page(title: str, source: str, *parts: str) -> str:
    """Return a page: where it comes from, its title, and its parts."""
    return "\n\n".join([f"<!-- Made by docs/generate.py from {source}. -->", f"# {title}", *filter(None, parts)]) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, nothing where it has no rows."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) if rows else ""


def code(text: str, language: str = "text") -> str:
    """Return a block of code; of Python with the quotes that the formatter wants, which looks into pages too."""
    text = text.replace("'", '"') if language == "python" else text
    return f"```{language}\n{text}\n```"


# -- the command line

CODES = {
    0: "Done, safe, or equal.",
    1: "The answer is no: different, unsafe, refused, not ready, or a stopped table.",
    2: "The request or the spec is wrong. Another try of the same changes nothing.",
    3: "It could not finish. Nothing is lost: run it again when the cause is gone.",
    130: "It was interrupted. Nothing is lost: the same command goes on from there. The demo begins anew.",
}
NO = {
    "check": "the plan is unsafe",
    "run": "a table is different",
    "prove": "a race ended differently in spite of the tombstones",
    "verify": "a table is different",
    "status": "with `--check`, something needs attention",
    "demo": "a verdict is different, or the tour did not end as it should",
}
"""The commands that answer by their exit code, and what 1 means there."""

ARGUMENTS = {
    "SPEC": "The migration's TOML file.",
    "DSN": "`env:NAME`, the environment variable that holds the old store's DSN.",
    "TABLE": "The table, as `schema.name`.",
    "KEY...": "The target's key, a value for each of its columns.",
}
SECTIONS = {
    "Plan": "Before anything is made.",
    "Move": "From the first object to the verdict.",
    "Hand over": "Writes move from one store to the other, stage by stage.",
    "Look": "These change nothing.",
    "End": "What changeover made is removed.",
    "Try": "Without a table of yours.",
}
COMPLETION = """\
To complete commands and options in a shell, add one line to its start-up file:

| shell | line |
| --- | --- |
| bash | `eval "$(_CHANGEOVER_COMPLETE=bash_source changeover)"` |
| zsh | `eval "$(_CHANGEOVER_COMPLETE=zsh_source changeover)"` |
| fish | `_CHANGEOVER_COMPLETE=fish_source changeover \\| source` |"""


def commands(group: click.Group = main, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, click.Command]]:
    """Return every command in its order: its words, its section, and itself."""
    for name, command in group.commands.items():
        section = str(getattr(group if above else command, "section", ""))
        if isinstance(command, click.Group):
            yield from commands(command, (*above, name))
        else:
            yield (*above, name), section, demo if name == "demo" else command


def cli() -> str:
    """Return the page of the command line."""
    parts = [
        "Each command calls one function of [`changeover.api`](python.md). An error is one sentence on standard error."
        " With `--json` a command prints one JSON object on standard output, and nothing else there."
        " `changeover -h` lists the commands, and `-h` behind a command prints what stands here.",
        COMPLETION,
        "## Exit codes\n\nA command ends with one of these. Where 1 is an answer, the command says so below.",
        exit_codes(),
    ]
    found = list(commands())
    for section in dict.fromkeys(section for _, section, _ in found):
        parts.append(f"## {section}\n\n{SECTIONS[section]}")
        parts += [one_command(words, command) for words, of, command in found if of == section]
    return page("Command line", "src/changeover/cli", *parts)


def exit_codes() -> str:
    """Return the table of exit codes, those of the errors and 0."""
    known = {value.exit_code for value in vars(errors).values() if is_error(value)}
    return table(["code", "meaning"], [[str(number), CODES[number]] for number in sorted(known | {0})])


def one_command(words: tuple[str, ...], command: click.Command) -> str:
    """Return a command's section."""
    name = "changeover " + " ".join(words)
    context = click.Context(command, info_name=name, help_option_names=HELP["help_option_names"])
    rows = [
        [option_name(one, context), option_meaning(one)]
        if isinstance(one, click.Option)
        else [f"`{one.make_metavar(context)}`", ARGUMENTS[one.make_metavar(context)]]
        for one in command.params
    ]
    return "\n\n".join(
        filter(
            None,
            [
                f"### {name}",
                inspect.cleandoc(command.help or ""),
                code(" ".join([name, *command.collect_usage_pieces(context)])),
                table(["argument or option", "meaning"], rows),
                f"Exit code 1 says that {NO[words[-1]]}." if words[-1] in NO else "",
                code(str(getattr(command, "example", "")), "sh"),
            ],
        )
    )


def option_name(option: click.Option, context: click.Context) -> str:
    """Return an option with what it takes."""
    return f"`{', '.join(option.opts)}{'' if option.is_flag else ' ' + option.make_metavar(context)}`"


def option_meaning(option: click.Option) -> str:
    """Return what an option means, and its default where help shows it."""
    return (option.help or "") + (f" Default: `{option.default}`." if option.show_default else "")


# -- the spec

SCHEMA = ROOT / "src/changeover/spec.schema.json"


def spec(schema: Mapping[str, Any] | None = None) -> str:
    """Return the page of the spec, from its JSON schema."""
    whole = schema or json.loads(SCHEMA.read_text(encoding="utf-8"))
    parts = [
        "A migration is one TOML file. [Your first migration](../start/first-migration.md) explains a whole one."
        " An unknown key, a wrong type, a missing variable and a password in the file are refused by name."
        " Paths are relative to the file's own folder.",
        "The package holds the file's JSON schema as `changeover/spec.schema.json`. An editor that uses Taplo completes and"
        " checks a spec whose first line is `#:schema PATH`, with the path or address of that file.",
        *sections(whole, whole, ""),
    ]
    return page("Spec", "the spec's JSON schema", *parts)


def resolved(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema with its reference followed, without the alternative null; what stands beside the reference stays."""
    alternatives = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    if len(alternatives) == 1:
        schema = {**alternatives[0], **{key: value for key, value in schema.items() if key != "anyOf"}}
    if "$ref" in schema:
        found: Any = whole
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return {**resolved(found, whole), **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def sections(schema: Mapping[str, Any], whole: Mapping[str, Any], path: str) -> Iterator[str]:
    """Return a section for each TOML table of a schema, its own keys first."""
    rows, below = [], []
    for key, given in schema.get("properties", {}).items():
        value = resolved(given, whole)
        items = resolved(value.get("items", {}), whole)
        named = resolved(value.get("additionalProperties") or {}, whole)
        name = f"{path}.{key}" if path else key
        if "properties" in value:
            below += headed(f"[{name}]", value, [value], whole, name)
        elif "properties" in items:
            below += headed(f"[[{name}]]", value, [items], whole, name)
        elif kinds := named.get("oneOf") or named.get("anyOf") or ([named] if "properties" in named else []):
            below += headed(f"[{name}.NAME]", value, [resolved(one, whole) for one in kinds], whole, f"{name}.NAME")
        else:
            rows.append([f"`{key}`", requirement(key, value, schema), value.get("description", "")])
    if rows:
        yield table(["key", "value", "meaning"], rows)
    yield from below


def headed(title: str, of: Mapping[str, Any], kinds: Sequence[Mapping[str, Any]], whole: Mapping[str, Any], path: str) -> list[str]:
    """Return a TOML table's heading and what it says, then its sections, for each kind that it may be of."""
    return [f"## `{title}`", of.get("description", ""), *(part for kind in kinds for part in sections(kind, whole, path))]


def requirement(key: str, value: Mapping[str, Any], of: Mapping[str, Any]) -> str:
    """Return what a key takes, and whether it must be there."""
    if "const" in value:
        return f'`"{value["const"]}"`'
    if value.get("default") not in (None, [], {}):
        when = f"default `{json.dumps(value['default'])}`"
    else:
        when = "required" if key in of.get("required", ()) else "optional"
    return f"{takes(value)}, {when}"


def takes(value: Mapping[str, Any]) -> str:
    """Return what a value is, in words."""
    if "enum" in value:
        return " or ".join(f'`"{one}"`' for one in value["enum"])
    words = {"array": "list of strings", "object": "table of strings"}
    kind = str(value["type"])
    return words.get(kind, kind)


# -- errors

ADVICE = ROOT / "docs/operations/troubleshooting.md"
"""The page whose table says what to do about each sentence."""

KINDS: Sequence[tuple[type[Any], str, str]] = (
    (errors.UsageError, "The request is wrong", "Exit code 2. Another try of the same changes nothing."),
    (errors.Refused, "The answer is no", "Exit code 1. The request is understood, and it is refused."),
    (errors.CouldNotFinish, "It could not finish", "Exit code 3. What was done is kept, and the same command goes on from there."),
    (errors.Interrupted, "Interrupted", "Exit code 130."),
)


def is_error(value: Any) -> bool:
    """Return whether a value is a class of ours for errors."""
    return isinstance(value, type) and issubclass(value, errors.ChangeoverError)


def leaves() -> list[type[Any]]:
    """Return the errors with fields, which are raised as they are, in the order of the module."""
    found: list[type[Any]] = [value for value in vars(errors).values() if is_error(value)]
    return [*(error for error in found if is_dataclass(error)), JarsMissing]


def shape(error: type[Any]) -> str:
    """Return an error's sentence, with a gap for each of its fields."""
    values = {"float": 0.0, "tuple[str, ...]": ("…",)}
    names = {"path": "SPEC", "where": "KEY"} if error is errors.SpecError else {}
    whole = str(error(*(names.get(one.name, values.get(str(one.type), "…")) for one in fields(error))))
    return re.sub(r"\b0 s\b", "… s", whole)


def advice(text: str) -> dict[str, str]:
    """Return what a page's tables say to do about each sentence, by the sentence with its gaps."""
    tables = re.findall(r"^\| it says \|.*\n\|[ -|]*\n((?:\|.*\n?)*)", text, re.M)
    return {said: what for rows in tables for said, what in re.findall(r"^\| `([^`]+)`[^|]*\| (.*) \|$", rows, re.M)}


def says(text: str, error: type[Any]) -> bool:
    """Return whether a sentence of a page, with its gaps, is that of an error."""
    return re.match(".*".join(map(re.escape, text.split("…"))), shape(error)) is not None


def remedy(error: type[Any]) -> str:
    """Return what to do about an error."""
    found = [what for said, what in advice(ADVICE.read_text(encoding="utf-8")).items() if says(said, error)]
    if len(found) != 1:
        raise KeyError(f"{ADVICE.name} has {len(found)} rows for {error.__name__}: {shape(error)}")
    return found[0]


def error_page() -> str:
    """Return the page of the errors."""
    parts = [
        "An error is one sentence on standard error. It says what happened, where, and what to do."
        " In Python it is an exception of `changeover.errors`, with the parts of its sentence as attributes."
        " In the sentences below … is a gap. [Troubleshooting](../operations/troubleshooting.md) begins at the symptom.",
        "A wrong row is never an error: it is data in a verdict. A comparison without an answer is one.",
        "## Exit codes",
        exit_codes(),
    ]
    for kind, title, text in KINDS:
        parts += [f"## {title}", text, *(one_error(one) for one in leaves() if issubclass(one, kind))]
    return page("Errors", "src/changeover/errors.py", *parts)


def one_error(error: type[Any]) -> str:
    """Return an error's section."""
    parts = ", ".join(f"`{one.name}`" for one in fields(error))
    return "\n\n".join(
        [
            f"### {error.__name__}",
            inspect.cleandoc(error.__doc__ or ""),
            code(shape(error)),
            f"- What to do: {remedy(error)}\n"
            f"- The same command again, unchanged: {'may help' if error.transient else 'does not help'}.\n"
            f"- Attributes: {parts}.",
        ]
    )


# -- Python

API = "changeover.api"
ALSO = ("changeover.stores.delta.store.live_rows", "changeover.flags.flagfile.client")
"""Public names that no function of the Python face returns."""

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
HEADS = re.compile(r"^(Args|Returns|Raises|Yields):$", re.M)


class AsWritten(ast.NodeTransformer):
    """Keeps numbers as the source writes them, such as 0o700 and 1_000."""

    def __init__(self, text: str) -> None:
        self.text = text

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        """Return a name that reads as the number."""
        return ast.Name(str(ast.get_source_segment(self.text, node))) if type(node.value) is int else node


@cache
def module(name: str) -> ast.Module:
    """Return a module's syntax tree; nothing is imported."""
    path = ROOT / "src" / name.replace(".", "/")
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    tree: ast.Module = AsWritten(text).visit(ast.parse(text))
    return tree


def definition(name: str, within: str) -> tuple[Definition, str]:
    """Return where a name is defined, followed through imports, with the docstring behind an assignment."""
    for node in ast.walk(module(within)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node, ast.get_docstring(node) or ""
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("changeover"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return definition(alias.name, node.module)
    for node, doc in documented(module(within).body):
        if target(node) == name:
            return node, doc
    raise KeyError(f"{within}.{name}")


def documented(body: Sequence[ast.stmt]) -> Iterator[tuple[ast.Assign | ast.AnnAssign, str]]:
    """Return each assignment of a body with the text that stands behind it."""
    for node, behind in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            said = behind.value if isinstance(behind, ast.Expr) else None
            yield node, inspect.cleandoc(str(said.value)) if isinstance(said, ast.Constant) else ""


def target(node: ast.Assign | ast.AnnAssign) -> str:
    """Return the name that an assignment gives."""
    return ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])


def python() -> str:
    """Return the page of the Python face: functions, the router, and what they return."""
    tree = module(API)
    exported = next(
        ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and target(node) == "__all__"
    )
    order = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in exported]
    classes = [name for name in exported if name not in order]
    results = [
        alias.name
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("changeover")
        for alias in node.names
    ]
    parts = [
        "`changeover.api` has one function for each command, with the command's own words."
        " An application imports the router from it, and needs the base install alone."
        " Every function raises the errors of [`changeover.errors`](errors.md).",
        "## Functions",
        *(entry(name, *definition(name, API)) for name in order),
        "## Router and spec",
        *(entry(name, *definition(name, API)) for name in classes),
        "## What functions return",
        *(entry(name, *definition(name, API)) for name in sorted(set(results) - set(classes))),
        "## Beside the command line",
        *(entry(path.rpartition(".")[2], *definition(*reversed(path.rsplit(".", 1))), path) for path in ALSO),
    ]
    return page("Python", "the docstrings of changeover.api", *parts)


def entry(name: str, node: Definition, doc: str, title: str = "") -> str:
    """Return the section of a name."""
    if isinstance(node, ast.FunctionDef):
        return "\n\n".join([f"### {title or name}", code(signature(node), "python"), described(doc)])
    if not isinstance(node, ast.ClassDef):
        return "\n\n".join(filter(None, [f"### {title or name}", code(ast.unparse(node), "python"), doc]))
    lines, texts = [], []
    for field, text in documented(node.body):
        if isinstance(field, ast.AnnAssign) and not target(field).startswith("_"):
            lines.append(f"    {ast.unparse(field)}")
            texts += [f"- `{target(field)}`: {' '.join(text.split())}"] if text else []
    methods = [one for one in node.body if isinstance(one, ast.FunctionDef) and not one.name.startswith("_")]
    return "\n\n".join(
        filter(
            None,
            [
                f"### {title or name}",
                code("\n".join([f"class {name}:", *lines]), "python") if lines else "",
                described(doc),
                "\n".join(texts),
                *(method(name, one) for one in methods),
            ],
        )
    )


def method(owner: str, node: ast.FunctionDef) -> str:
    """Return the section of a method."""
    return "\n\n".join([f"#### {owner}.{node.name}", code(signature(node), "python"), described(ast.get_docstring(node) or "")])


def signature(node: ast.FunctionDef) -> str:
    """Return a function's first lines, a line for each parameter where they are long."""
    marks = "".join(f"@{ast.unparse(one)}\n" for one in node.decorator_list)
    given, result = parameters(node.args), f" -> {ast.unparse(node.returns)}" if node.returns else ""
    whole = f"def {node.name}({', '.join(given)}){result}: ..."
    if len(whole) > WIDTH:
        whole = f"def {node.name}(\n" + "".join(f"    {one},\n" for one in given) + f"){result}: ..."
    return marks + whole


def parameters(given: ast.arguments) -> list[str]:
    """Return the parameters of a function; none of ours takes any number of them."""
    before: list[ast.expr | None] = [None] * (len(given.args) - len(given.defaults))
    by_place = zip(given.args, [*before, *given.defaults], strict=True)
    by_name = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    return [*(parameter(*one) for one in by_place), *(["*"] if given.kwonlyargs else []), *(parameter(*one) for one in by_name)]


def parameter(given: ast.arg, default: ast.expr | None) -> str:
    """Return a parameter with its type and default."""
    return ast.unparse(given) + (f" = {ast.unparse(default)}" if default is not None else "")


def described(doc: str) -> str:
    """Return a docstring as Markdown: its text, then what it takes, returns and raises."""
    text, *rest = HEADS.split(doc)
    parts = [text.strip()]
    for head, body in zip(rest[::2], rest[1::2], strict=True):
        lines = inspect.cleandoc(body.strip("\n")).splitlines()
        parts.append(f"**{head}**")
        if head in ("Args", "Raises"):
            entries = re.split(r"\n(?=\S)", "\n".join(lines))
            parts.append("\n".join(re.sub(r"^([\w*]+):", r"- `\1`:", " ".join(one.split())) for one in entries))
        else:
            parts.append("\n".join(lines))
    return "\n\n".join(filter(None, parts))


# -- settings


def setting_page() -> str:
    """Return the page of the server's settings."""
    pinned = [[f"`{one.name}`", f"`{one.value}`", one.why] for one in settings.PINNED]
    asked = [[f"`{one.name}`", one.consequence, "refused" if one.reason else "noted"] for one in settings.ASKED]
    left = [[why, ", ".join(f"`{name}`" for name in names)] for why, names in settings.LEFT.items()]
    return page(
        "Settings",
        "src/changeover/settings.py",
        "A server, a database, a role, the environment and a DSN may all change what a session reads."
        " So every session of changeover pins the settings that matter. In a session of your application's own nothing is set.",
        "## Pinned in every session",
        table(["setting", "value", "why"], pinned),
        "## Asked by `check`\n\nOnly a superuser may change these, so `changeover check SPEC` looks at them.",
        table(["setting", "why", "the plan is"], asked),
        "## Left as they are",
        table(["why", "settings"], left),
    )


PAGES: Mapping[str, Callable[[], str]] = {
    "cli.md": cli,
    "spec.md": spec,
    "errors.md": error_page,
    "python.md": python,
    "settings.md": setting_page,
}

if __name__ == "__main__":
    for file, make in PAGES.items():
        (REFERENCE / file).write_text(make(), encoding="utf-8")
