"""How the closed lists of request fields select, ignore and refuse."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_breakers.api.endpoints import ENDPOINTS
from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.field_lists import CHAT_FIELDS, COMPLETION_FIELDS

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> dict[str, Any]:
    return CHAT_FIELDS.select({"messages": MESSAGES, **fields}, max_choices=4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("structured_outputs", {"choice": ["x"] * 513}),
        ("structured_outputs", {"regex": "a" * 70_000}),
        ("response_format", {"type": "json_schema", "json_schema": {"x": "a" * 70_000}}),
        ("stop", ["a" * 5_000]),
        ("tools", [{"type": "function", "function": {"name": "f" * 140_000}}]),
    ],
)
def test_refuses_what_takes_seconds_to_compile_or_search(field: str, value: Any) -> None:
    with pytest.raises(ApiError, match="at most") as caught:
        chat(**{field: value})
    assert (caught.value.status, caught.value.param) == (400, field)


def test_unknown_fields_are_named_together() -> None:
    with pytest.raises(ApiError, match="'bar', 'foo'") as caught:
        chat(foo=1, bar=None)
    assert (caught.value.status, caught.value.code) == (400, "unknown_parameter")


def test_a_refused_field_that_says_nothing_is_dropped() -> None:
    selected = chat(use_beam_search=False, cache_salt=None, priority=0, store=True, user="u")
    assert selected == {"messages": MESSAGES, "user": "u"}


def test_a_neutral_value_is_compared_by_type_too() -> None:
    with pytest.raises(ApiError, match="'priority' is not served"):
        chat(priority=False)


@pytest.mark.parametrize("n", [0, -1, 5, True, "2", 1.0, [1]])
def test_refuses_a_number_of_choices_out_of_range(n: Any) -> None:
    with pytest.raises(ApiError) as caught:
        chat(n=n)
    assert caught.value.param == "n"


def test_prompts_and_choices_are_limited_together() -> None:
    select = COMPLETION_FIELDS.select
    select({"prompt": ["a", "b"], "n": 2}, max_choices=4)
    with pytest.raises(ApiError, match="got 6 completions"):
        select({"prompt": ["a", "b", "c"], "n": 2}, max_choices=4)


RULES = [spec.rules for spec in ENDPOINTS.values()]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    sorted({name for rules in RULES for name in (*rules.names, *rules.refused)})
)


@given(st.dictionaries(NAMES | st.text(max_size=8), JSON, max_size=6))
def test_any_object_is_selected_or_refused(data: dict[str, Any]) -> None:
    for rules in RULES:
        try:
            selected = rules.select(dict(data), max_choices=4)
        except ApiError as error:
            assert error.status == 400
        else:
            assert selected.keys() <= rules.allowed
