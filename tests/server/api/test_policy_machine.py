"""Requests, trips, reloads, rotated keys, faults and a drain in any order, against a small model.

The app is the real one, with its policy file, audit log and metrics; the engine is a script
(judging_engine.py). What must come of each request is worked out here by plain comparisons.
"""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from circuit_breakers.api.service import Service
from circuit_breakers.api.trail import open_trail
from circuit_breakers.audit.verification import verify_rows
from circuit_breakers.errors import ConfigError

from .governed_app import governed_app, key_table, policy_file
from .judging_engine import Client, Fault, JudgingServing
from .policy_model import OWN_THRESHOLD, STRICTNESS, Model, Request, Rule, Trip
from .scripted_engine import NUM_PROMPT_TOKENS

REFUSAL = "I can't help with that."


POLICIES = st.builds(
    Rule,
    name=st.just("-"),
    threshold=st.sampled_from([1.0, 3.0, OWN_THRESHOLD]),
    mode=st.sampled_from(["enforce", "observe"]),
    action=st.sampled_from(STRICTNESS),
)
GUARDS = (
    st.none()
    | st.none()
    | st.fixed_dictionaries(
        {},
        optional={
            "policy": st.sampled_from(["standard", "second", "missing"]),
            "mode": st.sampled_from(["enforce", "observe"]),
            "threshold": st.sampled_from([0.5, 2.5, 5.0]),
        },
    )
)
SCORES = st.lists(st.sampled_from([0.0, 0.0, 2.0, 3.5, 9.0, None]), min_size=1, max_size=5)
BAD_FILES = {
    "empty": "",
    "no TOML": "default = ",
    "no default": 'default = "none"\n[policies.a]\n',
    "no keys": 'default = "a"\n[policies.a]\n',
    "no such probe": 'default = "a"\n[policies.a]\nthreshold = {p9 = 1.0}\nKEYS',
    "no such promise": 'default = "a"\n[policies.a]\ntarget_fpr = 0.001\nKEYS',
    "nested too deeply": "x = " + "[" * 2000,
}


class Machine(RuleBasedStateMachine):
    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.model = Model()
        self.runner = asyncio.Runner()
        self.generation = 0
        self.num_chats = 0
        self.open: list[Request] = []
        self.runner.run(self._start())

    async def _start(self) -> None:
        self._write({"standard": Rule("standard")}, {"team": "team", "ops": "ops"})
        self.app = governed_app(self.path / "policies.toml", audit_db=self.path / "audit.db")
        self.service: Service = self.app.state.service
        self.service.trail = open_trail(self.service.settings, self.service.metrics)
        self.serving = JudgingServing()
        self.service.attach(self.serving)  # type: ignore[arg-type]
        self.service.ready()

    def _write(self, policies: dict[str, Rule], keys: dict[str, str]) -> None:
        self.model.policies, self.model.keys = policies, keys
        text = 'default = "standard"\n' + "".join(p.toml() for p in policies.values())
        self._write_text(text + self._key_tables(keys))

    def _key_tables(self, keys: dict[str, str]) -> str:
        lines = {"team": f'policy = "{list(self.model.policies)[-1]}"', "ops": 'scope = ["admin"]'}
        return "".join(key_table(key_id, lines[key_id], key=key) for key, key_id in keys.items())

    def _write_text(self, text: str) -> None:
        policy_file(self.path)  # the pepper
        (self.path / "policies.toml").write_text(text)

    def teardown(self) -> None:
        for request in list(self.open):
            self.leave(request)
        self.runner.run(asyncio.to_thread(self.service.trail.close))
        assert self.serving.engine.num_open == 0
        assert self.service.admission.num_inside == 0
        self.runner.close()
        self._check_log()
        self.folder.cleanup()

    # Operators.

    @rule(one=POLICIES, two=POLICIES | st.none(), by_signal=st.booleans(), rotates=st.booleans())
    def reload(self, one: Rule, two: Rule | None, by_signal: bool, rotates: bool) -> None:
        policies = {"standard": replace(one, name="standard")}
        if two is not None:
            policies["second"] = replace(two, name="second")
        keys = dict(self.model.keys)
        if rotates:
            # The one before stays good until the next rotation.
            self.generation += 1
            team = [key for key, key_id in keys.items() if key_id == "team"][-1]
            keys = {team: "team", f"team-{self.generation}": "team", "ops": "ops"}
        self._write(policies, keys)
        assert self._reload(by_signal)
        self.model.reloads["reload"] += 1

    @rule(what=st.sampled_from(sorted(BAD_FILES)), by_signal=st.booleans())
    def reload_a_bad_file(self, what: str, by_signal: bool) -> None:
        before = self.service.governance.rules
        self._write_text(BAD_FILES[what].replace("KEYS", key_table("ops", 'scope = ["admin"]')))
        assert not self._reload(by_signal)
        assert self.service.governance.rules is before
        self.model.reloads["reload refused"] += 1

    def _reload(self, by_signal: bool) -> bool:
        if by_signal:
            with suppress(ConfigError):
                self.service.reload_policies()
                return True
            return False
        client = self._ask("/v1/breaker/reload", "ops", {})
        self.runner.run(client.end())
        assert client.status in (200, 400)
        return client.status == 200

    @precondition(lambda self: self.num_chats >= 6 and not self.model.is_draining)
    @rule()
    def drain(self) -> None:
        self.service.leave()
        self.service.admission.close()
        self.model.is_draining = True

    @precondition(lambda self: self.num_chats >= 6 and not self.model.is_dead)
    @rule()
    def die(self) -> None:
        self.serving.engine.errored = self.model.is_dead = True

    # Clients.

    @rule(
        target=held,
        key_number=st.integers(0, 7),
        guard=GUARDS,
        prompt=st.sampled_from([0.0, 0.0, 0.0, 2.0, 9.0]),
        scores=SCORES,
        fault=st.none()
        | st.none()
        | st.sampled_from(["lets a trip through", "gives no score", "dies"]),
        streams=st.booleans(),
        holds=st.booleans(),
    )
    def chat(
        self,
        key_number: int,
        guard: dict[str, Any] | None,
        prompt: float,
        scores: list[float | None],
        fault: Fault | None,
        streams: bool,
        holds: bool,
    ) -> Any:
        self.num_chats += 1
        good = [key for key, key_id in self.model.keys.items() if key_id == "team"]
        # The first key of all is good until the second rotation.
        key = {0: "nobody", 1: "team"}.get(key_number, good[key_number % len(good)])
        script = {"prompt": prompt, "scores": scores, "fault": fault, "stream": streams}
        body = {"messages": [], **script, "held": streams and holds}
        num_calls = len(self.serving.calls)
        client = self._ask(
            "/v1/chat/completions", key, body if guard is None else body | {"guard": guard}
        )
        error = self.model.refusal(key, guard)
        if error is not None:
            self.runner.run(client.end())
            assert len(self.serving.calls) == num_calls
            assert (client.status, client.chunks[0]["error"]["code"]) == error
            return multiple()
        is_running = (
            self.runner.run(client.first_token())
            if streams and holds and len(scores) > 1
            else False
        )
        (call,) = self.serving.calls[num_calls:] or [None]
        own = list(self.model.policies.values())[-1]
        asked = self.model.tightened(own, guard or {})
        assert asked is not None
        request = Request(client, "team", asked, prompt, scores, fault, streams, call)
        if is_running:
            self.open.append(request)
            return request
        self.runner.run(client.end())
        self._check_end(request)
        return multiple()

    @rule(request=consumes(held))
    def go_on(self, request: Request) -> None:
        self.open.remove(request)
        self.runner.run(self._open_gate(request))
        self._check_end(request)

    async def _open_gate(self, request: Request) -> None:
        request.call.gate.set()
        await request.client.end()

    @rule(request=consumes(held))
    def leave(self, request: Request) -> None:
        """The client goes away in the middle of a stream."""
        self.open.remove(request)
        self.runner.run(request.client.leave())
        self.model.requests[request.rule.name, "aborted"] += 1
        trip = request.first_trip(1)
        if trip is not None:
            self._note_trip(request, trip, "observed")
        assert _text(request.client) == "x"

    def _ask(self, path: str, key: str, body: dict[str, Any]) -> Client:
        async def ask() -> Client:
            return Client(self.app, path, key, body)

        return self.runner.run(ask())

    # What must have come of it.

    def _check_end(self, request: Request) -> None:
        rule, scores, client = request.rule, request.scores, request.client
        last, enforces = len(scores) - 1, rule.mode == "enforce"
        # Tokens whose scores count: those before the engine gives out.
        num_scored = last if request.fault in ("dies", "gives no score") else last + 1
        trip = request.first_trip(num_scored)
        unscored = next((i for i, s in enumerate(scores[:num_scored]) if s is None), None)
        stop = trip if enforces else unscored
        text, outcome = "x" * len(scores), "ok"
        if stop is not None:
            phase = "prompt" if stop < 0 else "completion"
            text, outcome = "x" * max(stop, 0), f"tripped_{phase}"
            leaks = request.fault == "lets a trip through" and stop == last
            if leaks:
                self.model.num_leaked += scores[last] is not None
        else:
            leaks = False
            if num_scored <= last:
                text, outcome = "x" * last, "error"
        if trip is not None:
            stops = stop is not None and (enforces or unscored is not None)
            self._note_trip(request, trip, "stopped" if stops else "observed")
        self.model.num_unscored += unscored is not None and (stop is None or stop >= unscored)
        if leaks and not (request.streams and last):
            outcome = "error"
        self.model.requests[rule.name, outcome] += 1
        shown = _text(client)
        assert shown.removesuffix(REFUSAL).count("x") <= len(text), "a token at or past the trip"
        is_refused = stop is not None and rule.action == "refuse" and not leaks
        if outcome == "ok":
            assert shown == text
        elif request.streams and not (stop is not None and stop < 0):
            assert shown == text + REFUSAL * is_refused
        else:
            assert shown == REFUSAL * is_refused or (rule.action == "stop" and shown == text)

    def _note_trip(self, request: Request, trip: int, action: str) -> None:
        phase = "prompt" if trip < 0 else "completion"
        index = NUM_PROMPT_TOKENS + trip
        self.model.trips.append(Trip(request.key_id, request.rule.name, phase, action, index))

    @invariant()
    def metrics_are_the_models(self) -> None:
        counted: dict[str, Counter[tuple[str, ...]]] = {
            name: Counter() for name in ("requests", "trips", "refused_requests")
        }
        single = {}
        for metric in self.service.registry.collect():
            name = metric.name.removeprefix("circuit_breakers_")
            for sample in metric.samples:
                if sample.name.endswith("_total") and name in counted:
                    labels = {k: v for k, v in sample.labels.items() if k != "model"}
                    counted[name][tuple(labels[k] for k in sorted(labels))] += int(sample.value)
                elif sample.name.endswith("_total"):
                    single[name] = sample.value
        trips = Counter((t.action, t.phase, t.policy) for t in self.model.trips)
        assert +counted["requests"] == Counter(
            {(o, p): n for (p, o), n in self.model.requests.items()}
        )
        assert +counted["trips"] == trips
        assert +counted["refused_requests"] == Counter(
            {(k,): n for k, n in self.model.refused.items()}
        )
        assert single["leaked_tokens"] == self.model.num_leaked
        assert single["unscored_tokens"] == self.model.num_unscored
        assert single["audit_dropped"] == 0

    def _check_log(self) -> None:
        with sqlite3.connect(self.path / "audit.db") as db:
            db.row_factory = sqlite3.Row
            rows = [dict(row) for row in db.execute("SELECT * FROM audit_log ORDER BY seq")]
        db.close()
        assert verify_rows(rows).findings == ()
        trips = [
            Trip(*(row[name] for name in Trip._fields)) for row in rows if row["kind"] == "trip"
        ]
        assert Counter(trips) == Counter(self.model.trips)
        acts = Counter(row["action"] for row in rows if row["kind"] == "admin")
        assert acts == Counter({"started": 1}) + self.model.reloads


def _text(client: Client) -> str:
    """All that the client has been shown of an answer."""
    choices = [choice for chunk in client.chunks for choice in chunk.get("choices", ())]
    parts = [choice.get("delta") or choice.get("message") or {} for choice in choices]
    return "".join(part.get("content") or "" for part in parts)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=20, stateful_step_count=20, suppress_health_check=list(HealthCheck), deadline=None
)
