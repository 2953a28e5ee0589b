import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.dataset import load_dataset, read_summary
from circuit_breakers_training.data.jsonl import Conversation, Message, write_conversations
from circuit_breakers_training.data.overlap import overlapping
from circuit_breakers_training.data.split import SPLITS


def _write(directory: Path, groups: dict[str, str]) -> None:
    digests = {}
    for name in SPLITS:
        messages = (Message("user", name), Message("assistant", "yes"))
        row = Conversation(messages=messages, label="benign", source="s", group=groups[name])
        file = f"{name}.jsonl"
        digests[file] = write_conversations(directory / file, [row])
    (directory / "dataset.json").write_text(json.dumps({"schema_version": 1, "sha256": digests}))


def test_splits_come_back_by_name(tmp_path: Path) -> None:
    _write(tmp_path, {name: name for name in SPLITS})
    dataset = load_dataset(tmp_path)
    assert [row.prompt for row in dataset.selection] == ["selection"]
    assert set(dataset.digests) == {f"{name}.jsonl" for name in SPLITS}


def test_prompts_are_known_by_split(tmp_path: Path) -> None:
    _write(tmp_path, {name: name for name in SPLITS})
    digests = load_dataset(tmp_path).prompt_digests
    assert list(digests) == list(SPLITS)
    for name in SPLITS:
        assert overlapping(digests[name], SPLITS) == [name]


def test_a_group_in_two_splits_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, {"train": "a", "selection": "b", "calibration": "c", "test": "a"})
    with pytest.raises(DataError, match=r"test\.jsonl: got group 'a' which is in train too"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "got invalid JSON"),
        ("[]", "got schema_version None, expected 1"),
        ('{"schema_version": 2}', "got schema_version 2, expected 1"),
    ],
)
def test_a_broken_summary_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_summary(tmp_path)


def test_a_summary_without_digests_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"schema_version": 1}')
    with pytest.raises(DataError, match="got no sha256 table"):
        load_dataset(tmp_path)


def test_a_missing_split_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, {name: name for name in SPLITS})
    (tmp_path / "calibration.jsonl").unlink()
    with pytest.raises(DataError, match=r"calibration\.jsonl: cannot be read"):
        load_dataset(tmp_path)


KILLED_BEFORE_CHANGE = """
import os, signal, sys
from pathlib import Path
from circuit_breakers_training.data.dataset import write_dataset
from circuit_breakers_training.data.jsonl import Conversation, Message
from circuit_breakers_training.data.split import SPLITS

out, left = Path(sys.argv[1]), int(sys.argv[2])

def kill(event, args):
    global left
    if event in ("os.rename", "os.remove", "os.rmdir"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

messages = (Message("user", "hi"), Message("assistant", "new"))
rows = {
    name: [Conversation(messages=messages, label="benign", source="s", group=name)]
    for name in SPLITS
}
sys.addaudithook(kill)
write_dataset(out, rows, {"schema_version": 1})
"""


def test_a_kill_at_any_moment_leaves_the_old_dataset_or_the_new_one(tmp_path: Path) -> None:
    for moment in range(1, 20):
        parent = tmp_path / str(moment)
        out = parent / "data"
        out.mkdir(parents=True)
        _write(out, {name: name for name in SPLITS})
        command = [sys.executable, "-c", KILLED_BEFORE_CHANGE, str(out), str(moment)]
        ended = subprocess.run(command, check=False).returncode
        if out.exists():
            assert load_dataset(out).train[0].response in ("yes", "new")
        else:
            (old,) = parent.glob(".data.old-*")
            assert load_dataset(old).train[0].response == "yes"
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert [path.name for path in parent.iterdir()] == ["data"]
    # Away, in place, and the five files and the directory of the old one.
    assert moment == 9
