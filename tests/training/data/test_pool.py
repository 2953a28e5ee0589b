from circuit_breakers_training.data.jsonl import Conversation, Label, Message, default_group
from circuit_breakers_training.data.plan import Planned
from circuit_breakers_training.data.pool import Pool


def _row(*turns: str, answer: str = "yes", label: Label = "benign") -> Conversation:
    messages: list[Message] = []
    for turn in turns:
        messages += [Message("user", turn), Message("assistant", answer)]
    return Conversation(
        messages=tuple(messages), label=label, source="s", group=default_group(messages)
    )


def _open(prompt: str) -> Planned:
    messages = (Message("user", prompt),)
    return Planned(messages=messages, label="benign", source="s", group=default_group(messages))


def test_the_first_of_equal_conversations_is_kept_across_sources() -> None:
    pool = Pool([[_row("a"), _row("b")], [_row("a"), _row("a", answer="no"), _open("a")]])
    pool.drop_duplicates()
    assert [(e.source, len(e.row.messages)) for e in pool.entries] == [
        (0, 2),
        (0, 2),
        (1, 2),
        (1, 1),
    ]
    assert pool.dropped == [{}, {"exact duplicate": 1}]


def test_one_text_with_two_labels_is_left_out_altogether() -> None:
    pool = Pool([[_row("a"), _row("b")], [_row("a", label="harmful")]])
    pool.drop_duplicates()
    assert [entry.row.messages[0].content for entry in pool.entries] == ["b"]
    assert pool.dropped == [{"contradictory labels": 1}, {"contradictory labels": 1}]


def test_prompts_of_the_same_words_share_a_group_with_and_without_an_answer() -> None:
    pool = Pool([[_row("How do I wash a car?"), _open("Teach me to wash my car"), _row("Fly?")]])
    pool.merge_groups()
    groups = [entry.row.group for entry in pool.entries]
    assert groups[0] == groups[1] != groups[2]
    assert pool.group_sizes() == {"groups": 2, "largest": 2}


def test_a_later_turn_counts_if_it_tells_what_the_talk_is_about() -> None:
    asked = "Compare copper, silver, gold and iron wires"
    pool = Pool([[_row("Hello there"), _row("Good morning, machine", asked), _row(asked)]])
    pool.merge_groups()
    groups = [entry.row.group for entry in pool.entries]
    assert groups[1] == groups[2] != groups[0]


def test_thanks_do_not_join_what_has_nothing_in_common() -> None:
    pool = Pool([[_row("Copper wires", "Thanks, more?"), _row("Tulip bulbs", "Thanks, more?")]])
    pool.merge_groups()
    assert pool.group_sizes() == {"groups": 2, "largest": 1}


def test_dropped_rows_are_counted_by_source_and_reason() -> None:
    pool = Pool([[_row("a")], [_open("b"), _open("c")]])
    pool.drop_if(lambda row: isinstance(row, Planned), "no answer")
    assert pool.dropped == [{}, {"no answer": 2}]
    assert pool.user_turns() == ["a"]
