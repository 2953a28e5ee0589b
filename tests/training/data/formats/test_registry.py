from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.formats.format import Dropped, require_columns
from circuit_breakers_training.data.formats.registry import FORMATS, detect_format, get_format
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.data.plan import Planned
from circuit_breakers_training.data.records import Record

# The columns of the published files.
PUBLISHED = {
    "conversations": "messages label source category group kind",
    "circuit-breakers": "category prompt llama3_output output",
    "ultrachat": "prompt prompt_id messages",
    "xstest": "id type prompt completion annotation_1 annotation_2 agreement final_label",
    "xstest-prompts": "id prompt type label focus note",
    "wildguard": "prompt adversarial response response_harm_label response_refusal_label "
    "prompt_harm_label subcategory",
    "beavertails": "prompt response category is_safe",
    "harmbench": "Behavior FunctionalCategory SemanticCategory Tags ContextString BehaviorID",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_columns_give_the_format_away(name: str) -> None:
    assert detect_format(Record("f:2", dict.fromkeys(PUBLISHED[name].split(), ""))).name == name


@pytest.mark.parametrize(
    "columns",
    [
        "",
        "prompt output",  # any instruction data
        "messages",  # chats of an unknown label
        "prompt response",
    ],
)
def test_columns_that_leave_the_label_open_are_refused(columns: str) -> None:
    with pytest.raises(DataError, match=r"f:2: got the columns .*fit no format.*name the format"):
        detect_format(Record("f:2", dict.fromkeys(columns.split(), "")))


def test_columns_of_two_formats_are_refused() -> None:
    columns = PUBLISHED["wildguard"].split() + PUBLISHED["beavertails"].split()
    with pytest.raises(DataError, match=r"several formats, expected those of one: wildguard"):
        detect_format(Record("f:2", dict.fromkeys(columns, "")))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match=r'got the format "csv", expected one of conversations'):
        get_format("csv")


@pytest.mark.parametrize("name", FORMATS)
def test_missing_columns_are_named(name: str) -> None:
    wanted = get_format(name)
    fields = dict.fromkeys(wanted.columns[1:], "") | {"\ud800": 1}
    with pytest.raises(DataError) as caught:
        require_columns(Record("f:9", fields), wanted)
    error = str(caught.value)
    assert error.startswith("f:9: got the columns ")
    assert f"expected {', '.join(wanted.columns)} of the format {name!r}" in error
    error.encode()  # can be printed


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "a"]), inner, max_size=3)
    ),
    max_leaves=8,
)
SENSIBLE = st.sampled_from(
    ["user", "assistant", "harmful", "benign", "unharmful", "safe", "1_full_compliance", ""]
)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_values_are_a_row_or_a_data_error(name: str, data: st.DataObject) -> None:
    wanted = get_format(name)
    columns = {*wanted.columns, *PUBLISHED.get(name, "").split()}
    fields: dict[str, Any] = {column: data.draw(SENSIBLE | VALUES) for column in sorted(columns)}
    try:
        row = wanted.load(Record("f:5", fields))
    except DataError as error:
        assert str(error).startswith("f:5: ")
        str(error).encode()
    else:
        assert isinstance(row, Conversation | Planned | Dropped)
        if isinstance(row, Conversation):
            assert row.prompt.strip()
            assert row.response.strip()
