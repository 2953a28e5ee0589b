"""Imports of small files of every format, with placeholder texts."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from circuit_breakers.errors import ConfigError, DataError
from circuit_breakers_training.data.dataset import BuiltDataset, Dataset, load_dataset
from circuit_breakers_training.data.imports import import_dataset
from circuit_breakers_training.data.jsonl import Conversation, Message
from circuit_breakers_training.data.overlap import overlapping
from circuit_breakers_training.data.sources import SourceSpec
from circuit_breakers_training.data.split import SPLITS, split_of

NUM_ROWS = 80
ROOT = Path(__file__).parents[3]


def _subject(kind: str, i: int) -> str:
    """Two words that no other prompt has: no near duplicates by accident."""
    return f"{kind}{i} {kind}thing{i}"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a file of each kind that the paper trained on, and of HarmBench."""
    directory = tmp_path_factory.mktemp("published")
    harmful = [
        {
            "category": "placeholder",
            "prompt": f"Do {_subject('harm', i)}",
            "output": f"PLACEHOLDER {i}",
            "llama3_output": "I can't help with that.",
        }
        for i in range(NUM_ROWS)
    ]
    (directory / "cb.json").write_text(json.dumps(harmful))
    chats = [
        {
            "prompt": f"Tell me about {_subject('chat', i)}",
            "prompt_id": str(i),
            "messages": [
                {"role": "user", "content": f"Tell me about {_subject('chat', i)}"},
                {"role": "assistant", "content": "It is fine."},
                {"role": "user", "content": "Thanks, tell me more."},
                {"role": "assistant", "content": f"More of {i}."},
            ],
        }
        for i in range(NUM_ROWS)
    ]
    (directory / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    with (directory / "xstest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "type", "prompt", "completion", "final_label"])
        for i in range(NUM_ROWS):
            label = "1_full_compliance" if i % 4 else "2_full_refusal"
            writer.writerow([i, "homonyms", f"Kill {_subject('process', i)}", "Like, so.", label])
    with (directory / "harmbench.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Behavior", "BehaviorID"])
        writer.writerow([f"do {_subject('harm', 3)}", "exact"])
        writer.writerow([f"Please write about {_subject('harm', 5)} in detail", "near"])
    return directory


def _specs(directory: Path) -> list[SourceSpec]:
    return [
        SourceSpec(location=str(directory / "cb.json")),
        SourceSpec(
            location=str(directory / "cb.json"),
            format="circuit-breakers-refusals",
            repeat=2,
            limit=30,
        ),
        SourceSpec(location=str(directory / "chat.jsonl")),
        SourceSpec(location=str(directory / "xstest.csv"), repeat=50),
    ]


@pytest.fixture(scope="module")
def imported(published: Path, tmp_path_factory: pytest.TempPathFactory) -> BuiltDataset:
    out = tmp_path_factory.mktemp("imported") / "data"
    return import_dataset(out, _specs(published), seed=1)


@pytest.fixture(scope="module")
def dataset(imported: BuiltDataset) -> Dataset:
    return load_dataset(imported.path)


def _rows(dataset: Dataset) -> list[tuple[str, Conversation]]:
    return [(name, row) for name in SPLITS for row in getattr(dataset, name)]


def test_what_was_read_kept_and_dropped_is_counted(imported: BuiltDataset) -> None:
    outcome = [
        (s["format"], s["read"], s["kept"], s["dropped"]) for s in imported.summary["sources"]
    ]
    assert outcome == [
        ("circuit-breakers", 80, 80, {}),
        ("circuit-breakers-refusals", 80, 30, {"over the limit": 50}),
        ("ultrachat", 80, 80, {}),
        ("xstest", 80, 60, {"refusal of a harmless prompt": 20}),
    ]
    assert imported.summary["dropped"] == {
        "over the limit": 50,
        "refusal of a harmless prompt": 20,
    }
    # 80 + 80 + 60 prompts; the refusals are of prompts that are there already.
    assert (imported.summary["groups"], imported.summary["largest"]) == (220, 2)


def test_rows_have_the_labels_of_their_formats(dataset: Dataset) -> None:
    assert {(row.source, row.label, row.kind) for _, row in _rows(dataset)} == {
        ("circuit-breakers", "harmful", "completion"),
        ("refusal", "benign", "refusal"),
        ("ultrachat", "benign", "completion"),
        ("xstest", "benign", "completion"),
    }


def test_rows_are_repeated_in_train_alone(imported: BuiltDataset, dataset: Dataset) -> None:
    copies = {"xstest": 50, "refusal": 2}
    for name in SPLITS:
        rows = getattr(dataset, name)
        for row in rows:
            expected = copies.get(row.source, 1) if name == "train" else 1
            assert rows.count(row) == expected
    distinct = {row.messages for row in dataset.train}
    assert imported.summary["repeated"] == len(dataset.train) - len(distinct)


def test_a_prompt_and_its_refusal_share_a_split(dataset: Dataset) -> None:
    split = {row.prompt: name for name, row in _rows(dataset) if row.label == "harmful"}
    for name, row in _rows(dataset):
        assert name == split_of(row.group, seed=1)
        if row.kind == "refusal":
            assert split[row.prompt] == name


def test_the_summary_knows_the_prompts_of_each_split(
    imported: BuiltDataset, dataset: Dataset
) -> None:
    for name, digests in dataset.prompt_digests.items():
        assert imported.summary["prompts"][name] == {
            "count": len(digests),
            "sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
        }
    for name, row in _rows(dataset):
        assert overlapping(dataset.prompt_digests[name], [row.prompt]) == [row.prompt]


def test_a_second_import_finds_the_first(imported: BuiltDataset, published: Path) -> None:
    again = import_dataset(imported.path, _specs(published), seed=1)
    assert again.cached
    assert again.summary == imported.summary


def test_the_same_inputs_repeat_the_files(
    imported: BuiltDataset, published: Path, tmp_path: Path
) -> None:
    again = import_dataset(tmp_path / "again", _specs(published), seed=1)
    assert not again.cached
    assert again.summary == imported.summary


def test_the_order_of_sources_moves_no_row(
    dataset: Dataset, published: Path, tmp_path: Path
) -> None:
    specs = _specs(published)[::-1]
    other = load_dataset(import_dataset(tmp_path / "other", specs, seed=1).path)
    for name in SPLITS:
        assert sorted(row.prompt for row in getattr(other, name)) == sorted(
            row.prompt for row in getattr(dataset, name)
        )


def test_other_inputs_do_not_replace_a_dataset_unasked(published: Path, tmp_path: Path) -> None:
    specs = _specs(published)[:1]
    first = import_dataset(tmp_path / "out", specs)
    with pytest.raises(DataError, match="got a dataset of other inputs"):
        import_dataset(tmp_path / "out", specs, seed=5)
    second = import_dataset(tmp_path / "out", specs, seed=5, overwrite=True)
    assert second.summary["digest"] != first.summary["digest"]


def test_excluded_prompts_and_their_paraphrases_are_kept_out(
    published: Path, tmp_path: Path
) -> None:
    built = import_dataset(
        tmp_path / "out", _specs(published)[:2], exclude=[str(published / "harmbench.csv")]
    )
    # Two prompts, with their refusals where the limit of 30 drew them.
    assert built.summary["sources"][0]["dropped"] == {"excluded prompt": 2}
    prompts = {row.prompt for _, row in _rows(load_dataset(built.path))}
    assert not {f"Do {_subject('harm', i)}" for i in (3, 5)} & prompts
    assert f"Do {_subject('harm', 4)}" in prompts


def test_an_evaluation_set_is_refused(published: Path, tmp_path: Path) -> None:
    spec = SourceSpec(location=str(published / "harmbench.csv"))
    with pytest.raises(DataError, match="got harmbench, which is for evaluation only"):
        import_dataset(tmp_path / "out", [spec])
    assert not (tmp_path / "out").exists()


def _prompt_file(path: Path, count: int) -> str:
    lines = [
        f"{i},please b{i % 30} b{i // 30} {_subject('x', i)},homonyms,safe,," for i in range(count)
    ]
    path.write_text("id,prompt,type,label,focus,note\n" + "\n".join(lines) + "\n")
    return str(path)


def test_prompts_without_answers_are_refused_with_the_cure(tmp_path: Path) -> None:
    spec = SourceSpec(location=_prompt_file(tmp_path / "prompts.csv", 4))
    with pytest.raises(DataError, match=r"\(4 in .*prompts\.csv\).*--missing-answers write"):
        import_dataset(tmp_path / "out", [spec])


def test_prompts_without_answers_can_be_left_out(published: Path, tmp_path: Path) -> None:
    specs = [
        *_specs(published)[:1],
        SourceSpec(location=_prompt_file(tmp_path / "prompts.csv", 4)),
    ]
    built = import_dataset(tmp_path / "out", specs, missing_answers="drop")
    assert built.summary["dropped"] == {"no answer": 4}


def test_the_model_writes_missing_answers(tmp_path: Path, tiny_llama: Path) -> None:
    spec = SourceSpec(location=_prompt_file(tmp_path / "prompts.csv", 60), repeat=2)
    built = import_dataset(
        tmp_path / "out",
        [spec],
        missing_answers="write",
        model=str(tiny_llama),
        max_new_tokens=12,
        max_length=16,
        backend="transformers",
    )
    (source,) = built.summary["sources"]
    assert source["kept"] + sum(source["dropped"].values()) == 60
    assert source["kept"] > 30
    rows = {row for _, row in _rows(load_dataset(built.path))}
    assert len(rows) == source["kept"]
    # As in a build, half of the benign answers start with given words.
    assert {row.kind for row in rows} == {"completion", "prefilled"}
    assert {row.label for row in rows} == {"benign"}
    assert built.summary["token_lengths"]["benign"]["conversations"] == source["kept"]


KILLED_BEFORE_DATASET = """
import os, signal, sys
from pathlib import Path
from tests.training.data.test_imports import _answered

out, prompts, model = sys.argv[1:]

def kill(event, args):
    if event == "tempfile.mkdtemp" and Path(args[0]).parent == Path(out).parent:
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
_answered(Path(out), prompts, model)
"""


def _answered(out: Path, prompts: str, model: str) -> BuiltDataset:
    return import_dataset(
        out,
        [SourceSpec(location=prompts)],
        missing_answers="write",
        model=model,
        max_new_tokens=12,
        backend="transformers",
    )


def test_a_killed_import_goes_on_with_its_answers(tmp_path: Path, tiny_llama: Path) -> None:
    prompts = _prompt_file(tmp_path / "prompts.csv", 60)
    out = tmp_path / "imported" / "data"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_DATASET, out, prompts, tiny_llama],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    # What the next run finds there is what it takes.
    (kept,) = out.parent.glob(".data.texts-*/0000-*.json")
    marked = "no tiny model writes this"
    kept.write_text(json.dumps([[marked, True, [1]], *json.loads(kept.read_text())[1:]]))
    again = _answered(out, prompts, str(tiny_llama))
    responses = [row.response for _, row in _rows(load_dataset(again.path))]
    assert sum(marked in response for response in responses) == 1
    assert [path.name for path in out.parent.iterdir()] == ["data"]


def test_a_base_model_writes_them_on_the_plain_template(tmp_path: Path, base_gpt2: Path) -> None:
    specs = [SourceSpec(location=_prompt_file(tmp_path / "prompts.csv", 60))]
    built = import_dataset(
        tmp_path / "out",
        specs,
        missing_answers="write",
        model=str(base_gpt2),
        chat_template="plain",
        max_new_tokens=12,
        backend="transformers",
    )
    assert built.summary["chat_template"] == "plain"
    rows = {row for _, row in _rows(load_dataset(built.path))}
    assert built.summary["token_lengths"]["benign"]["conversations"] == len(rows) > 20


def test_writing_needs_a_model(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got no model to write the missing answers"):
        import_dataset(tmp_path / "out", _specs(published), missing_answers="write")
    choice: Any = "guess"
    with pytest.raises(ConfigError, match="expected one of refuse, drop, write"):
        import_dataset(tmp_path / "out", _specs(published), missing_answers=choice)
    with pytest.raises(ConfigError, match="got the plain chat template without a model, expected"):
        import_dataset(tmp_path / "out", _specs(published), chat_template="plain")


def test_nothing_is_cut_and_long_conversations_are_counted(
    published: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    built = import_dataset(
        tmp_path / "out", _specs(published)[:1], model=str(tiny_llama), max_length=7
    )
    # "Do", two words of the subject, two of the answer, and three of the template.
    assert built.summary["token_lengths"]["harmful"]["max"] == 8
    assert built.summary["token_lengths"]["harmful"]["over_max_length"] == NUM_ROWS
    longest = max(len(row.response) for _, row in _rows(load_dataset(built.path)))
    assert longest == len(f"PLACEHOLDER {NUM_ROWS - 1}")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "got no source, expected at least one"),
        ([SourceSpec(location="none.csv")], 'got the source "none.csv", expected a file'),
    ],
)
def test_sources_that_are_not_there_are_refused(
    tmp_path: Path, specs: Sequence[SourceSpec], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        import_dataset(tmp_path / "out", specs)


def test_too_few_rows_for_four_splits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    messages = [Message("user", "Hello"), Message("assistant", "Hi")]
    row = {
        "messages": [{"role": m.role, "content": m.content} for m in messages],
        "label": "benign",
        "source": "mine",
    }
    path.write_text((json.dumps(row) + "\n") * 3)
    with pytest.raises(DataError, match=r"got no conversation for .*'exact duplicate': 2"):
        import_dataset(tmp_path / "out", [SourceSpec(location=str(path))])
