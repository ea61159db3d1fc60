"""The service that LaunchDarkly's harness commands, without the harness: what it answers, what it calls, and what the SDK sends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.embedded.server import EmbeddedServer
from changeover.flags.stages import ORDER, TABLE, other
from tests.contract.client_entity import OPENER
from tests.contract.leaves import BY_DESIGN, Leaves
from tests.contract.payloads import Payloads
from tests.contract.protocol import CAPABILITIES, serving
from tests.contract.stand_in import StandIn, flag, standing_in
from tests.support.fix_flags import wait_until

CONTEXT = {"kind": "user", "key": "somebody", "name": "Some Body"}


@dataclass(frozen=True)
class Commander:
    """The harness's side of the protocol, towards one client."""

    url: str
    stand_in: StandIn
    path: str

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any, str | None]:
        """Send a request; return status, the answer, and where what it made is."""
        return asked(self.url, method, path, body)

    def command(self, name: str, params: dict[str, Any] | None = None) -> Any:
        """Command the client, and return its answer."""
        status, answer, _ = self.ask("POST", self.path, {"command": name, **({name: params} if params is not None else {})})
        assert 200 <= status < 300, (status, answer)
        return answer

    def operation(self, kind: str, key: str = "migration-key", default: Stage = Stage.DUALWRITE, **more: Any) -> Any:
        """Have an operation done, flush, and return its result and what is told of it, if anything is."""
        self.stand_in.calls.clear()
        self.stand_in.events.clear()
        result = self.command("migrationOperation", {
            "key": key, "context": CONTEXT, "defaultStage": default.value, "readExecutionOrder": "serial", "operation": kind,
            "oldEndpoint": f"{self.stand_in.url}/old", "newEndpoint": f"{self.stand_in.url}/new", "payload": "a payload",
            "trackLatency": False, "trackErrors": False, "trackConsistency": False, **more,
        })["result"]  # fmt: skip
        self.command("flushEvents")
        wait_until(lambda: any(event["kind"] == "summary" for event in self.stand_in.events))
        told = self.stand_in.operations()
        assert len(told) <= 1
        return result, told[0] if told else None


def asked(url: str, method: str, path: str, body: Any = None) -> tuple[int, Any, str | None]:
    """Send a request to the service."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with OPENER.open(urllib.request.Request(url + path, data, method=method)) as response:
            content = response.read()
            return response.status, json.loads(content) if content else None, response.headers["Location"]
    except urllib.error.HTTPError as error:
        with error:
            content = error.read()
        return error.code, json.loads(content) if content else None, None


@pytest.fixture(scope="module")
def payloads(server: EmbeddedServer) -> Iterator[Payloads]:
    """Make both stores."""
    with Payloads.on(server) as made:
        yield made


@pytest.fixture(scope="module")
def service(payloads: Payloads) -> Iterator[str]:
    """Serve."""
    with serving(payloads) as url:
        yield url


@pytest.fixture
def commander(service: str, request: pytest.FixtureRequest) -> Iterator[Commander]:
    """Make a client whose flags ask for a stage (the fixture's parameter), and end it."""
    stage: Stage = getattr(request, "param", Stage.SHADOW)
    index = ORDER.index(stage)
    with standing_in() as stand_in:
        never = {"samplingRatio": 0, "migration": {"checkRatio": 0}}
        stand_in.flags = {
            "migration-key": flag("migration-key", index),
            "unchecked": flag("unchecked", index, migration={"checkRatio": 0}),
            "unsampled": flag("unsampled", index, **never),
            "wrong-type": {**flag("wrong-type", 0), "variations": [True]},
        }
        configuration = {
            "credential": "sdk-key", "streaming": {"baseUri": stand_in.url},
            "events": {"baseUri": stand_in.url, "flushIntervalMs": 1_000_000},
        }  # fmt: skip
        status, _, path = asked(service, "POST", "/", {"tag": "a test", "configuration": configuration})
        assert status == 201
        assert path is not None
        yield Commander(service, stand_in, path)
        assert asked(service, "DELETE", path)[0] == 202
        assert asked(service, "DELETE", path)[0] == 404


def test_the_service_says_what_it_can_do_and_knows_no_other_command(commander: Commander) -> None:
    status, answer, _ = commander.ask("GET", "/")
    assert (status, tuple(answer["capabilities"])) == (200, CAPABILITIES)
    assert commander.ask("POST", commander.path, {"command": "evaluateAll", "evaluateAll": {}})[0] == 400
    assert commander.ask("POST", "/clients/none", {"command": "flushEvents"})[0] == 404


def test_a_flag_is_evaluated(commander: Commander) -> None:
    params = {"flagKey": "migration-key", "context": CONTEXT, "valueType": "string", "defaultValue": "off"}
    assert commander.command("evaluate", {**params, "detail": False}) == {"value": "shadow"}
    detail = commander.command("evaluate", {**params, "detail": True})
    assert (detail["variationIndex"], detail["reason"]) == (ORDER.index(Stage.SHADOW), {"kind": "FALLTHROUGH"})


@pytest.mark.parametrize("key", ["migration-key", "missing-key", "wrong-type"])
def test_the_default_is_for_a_flag_without_a_usable_answer(commander: Commander, key: str) -> None:
    params = {"key": key, "context": CONTEXT, "defaultStage": "rampdown"}
    found = commander.command("migrationVariation", params)["result"]
    assert found == ("shadow" if key == "migration-key" else "rampdown")
    _, told = commander.operation("read", key, Stage.RAMPDOWN)
    assert (told["evaluation"]["value"], told["evaluation"]["default"]) == (found, "rampdown")
    assert told["invoked"] == ({"old": True, "new": True} if found == "shadow" else {"new": True})


@pytest.mark.parametrize("commander", ORDER, indirect=True, ids=lambda stage: stage.value)
def test_an_operation_calls_and_tells_of_the_stores_that_its_stage_has(
    commander: Commander, payloads: Payloads, request: pytest.FixtureRequest
) -> None:
    stage: Stage = request.node.callspec.params["commander"]
    rule = TABLE[stage]
    for kind, first, both in (("read", rule.reads, rule.compares), ("write", rule.writes, rule.mirrors)):
        before = {origin: len(payloads.rows(origin)) for origin in Origin}
        result, told = commander.operation(kind, trackLatency=True, trackErrors=True, trackConsistency=True)
        stores = [first, other(first)] if both else [first]
        assert (result, commander.stand_in.calls) == ("hello", [(origin, "a payload") for origin in stores])
        assert told["operation"] == kind
        assert told["evaluation"]["value"] == stage.value
        assert told["context"]["key"] == "somebody"
        assert told["invoked"] == {origin.value: True for origin in stores}
        assert set(told["latency_ms"]) == {origin.value for origin in stores}
        assert ("error" in told, told.get("consistent")) == (False, True if kind == "read" and both else None)
        wrote = [origin for origin in Origin if len(payloads.rows(origin)) > before[origin]]
        assert set(wrote) == (set(stores) if kind == "write" else set())


@pytest.mark.parametrize("commander", [Stage.DUALWRITE, Stage.LIVE], indirect=True, ids=lambda stage: stage.value)
def test_a_store_that_fails_a_write_is_told_alone(commander: Commander, request: pytest.FixtureRequest) -> None:
    stage: Stage = request.node.callspec.params["commander"]
    authority = TABLE[stage].writes
    for failing in Origin:
        commander.stand_in.answers = {failing: (409, "")}
        result, told = commander.operation("write", trackErrors=True, trackLatency=True)
        assert told["error"] == {failing.value: True}
        refused = failing is authority
        assert told["invoked"] == {origin.value: True for origin in Origin if origin is authority or not refused}
        assert set(told["latency_ms"]) == set(told["invoked"])
        assert result == ("the callback answered 409" if refused else "hello")


def test_stores_that_differ_are_told_as_inconsistent(commander: Commander) -> None:
    commander.stand_in.answers = {Origin.NEW: (200, "good-bye")}
    result, told = commander.operation("read", trackConsistency=True)
    assert (result, told["consistent"]) == ("hello", False)


def test_a_store_that_fails_a_read_leaves_consistency_open(commander: Commander) -> None:
    commander.stand_in.answers = {Origin.NEW: (409, "")}
    result, told = commander.operation("read", trackConsistency=True, trackErrors=True)
    assert (result, told["error"], told["invoked"]) == ("hello", {"new": True}, {"old": True, "new": True})
    assert "consistent" not in told


def test_the_flags_ratios_are_the_sdks_to_keep(commander: Commander) -> None:
    _, told = commander.operation("read", "unchecked", trackConsistency=True)
    assert (told["invoked"]["old"], "consistent" in told) == (True, False)
    assert commander.operation("read", "unsampled", trackConsistency=True)[1] is None


@pytest.mark.heavy
@pytest.mark.parametrize(("leaf", "code"), [("read live", 0), ("read off", 1)], ids=["by design", "not by design"])
def test_a_run_fails_where_a_leaf_does_that_is_not_to(tmp_path: Path, leaf: str, code: int) -> None:
    program = tmp_path / "harness"
    program.write_text(f"""#!{sys.executable}
import sys, urllib.request
url = sys.argv[sys.argv.index("-url") + 1]
assert b"migrations" in urllib.request.build_opener(urllib.request.ProxyHandler({{}})).open(url).read()
print("[migrations/executes reads/{leaf}]\\n  FAILED: migrations/executes reads/{leaf}\\n[migrations/executes reads/another]")
""")
    program.chmod(0o755)
    path = os.pathsep.join(filter(None, ["src", os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-m", "tests.contract"], cwd=Path(__file__).parents[2], capture_output=True, text=True,
        env={**os.environ, "HARNESS": str(program), "PYTHONPATH": path},
    )  # fmt: skip
    assert (run.returncode, run.stdout.splitlines()[-2]) == (code, "1 of 2 leaves passed, 1 of 2 cases"), run.stderr
    assert run.stdout.splitlines()[-1] == f"  {'FAILED' if code else 'by design'}: migrations/executes reads/{leaf}"


OUTPUT = """
[other/a]
  FAILED: other/a
[group]
[group/a]
[group/a/twice]
[group/a/twice]
  FAILED: group/a/twice
  FAILED: group/a
[group/b]
  SKIPPED: group/b (excluded)
[group/c]
"""


def test_a_leaf_passes_where_all_its_cases_do() -> None:
    leaves = Leaves.of(OUTPUT, "group")
    assert str(leaves) == "1 of 2 leaves passed, 2 of 3 cases\n  FAILED: group/a/twice"
    assert leaves.unexpected == ["group/a/twice"]
    assert len(BY_DESIGN) == 8
