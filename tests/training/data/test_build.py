"""Real builds with the real default model; few prompts and short texts keep them quick."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from circuit_breakers.errors import DataError, ModelError
from circuit_breakers_training.data.build import BuiltDataset, build_dataset
from circuit_breakers_training.data.dataset import load_dataset
from circuit_breakers_training.data.generate import Backend, Request, open_generator
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.recipes.config import ChatTemplate

MODEL = "smollm2-135m-instruct"
ROOT = Path(__file__).parents[3]


def _build(
    out_dir: Path,
    *,
    seed: int = 0,
    chat_template: ChatTemplate = "model",
    overwrite: bool = False,
) -> BuiltDataset:
    return build_dataset(
        out_dir,
        model=MODEL,
        seed=seed,
        max_new_tokens=12,
        sampled_prompts=6,
        refusals=3,
        prompt_limit=5,
        chat_template=chat_template,
        backend="transformers",
        overwrite=overwrite,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltDataset:
    return _build(tmp_path_factory.mktemp("data") / "built")


def _rows(directory: Path) -> list[Conversation]:
    dataset = load_dataset(directory)
    return [*dataset.train, *dataset.selection, *dataset.calibration, *dataset.test]


def test_rows_are_labelled_by_source(built: BuiltDataset) -> None:
    rows = _rows(built.path)
    assert {row.source for row in rows if row.label == "harmful"} == {
        "harmful",
        "harmful_reworded",
        "harmful_after_refusal",
    }
    assert {row.source for row in rows if row.label == "benign"} == {
        "twin",
        "twin_reworded",
        "twin_after_refusal",
        "homonym",
        "topic",
        "follow_up",
        "sampled",
        "refusal",
    }
    assert {row.kind for row in rows if row.source == "harmful"} == {"prefilled", "completion"}
    assert {row.kind for row in rows if row.source == "refusal"} == {"refusal"}


def test_answers_are_text_of_the_model_after_its_prefill(built: BuiltDataset) -> None:
    for row in _rows(built.path):
        assert "<|im_" not in row.response
        assert "\ufffd" not in row.response
        assert len(row.response.split()) >= 4


def test_the_summary_counts_what_the_files_hold(built: BuiltDataset) -> None:
    dataset = load_dataset(built.path)
    for name in ("train", "selection", "calibration", "test"):
        rows: tuple[Conversation, ...] = getattr(dataset, name)
        counts = built.summary["counts"][name]
        assert counts.get("harmful", 0) + counts.get("benign", 0) == len(rows)
    assert built.summary["sha256"] == dataset.digests
    assert built.summary["model"] == MODEL
    assert sorted(path.name for path in built.path.parent.iterdir()) == ["built"]


def test_a_second_build_finds_the_first(built: BuiltDataset) -> None:
    again = _build(built.path)
    assert again.cached
    assert again.summary == built.summary


def test_the_same_seed_repeats_the_files(built: BuiltDataset, tmp_path: Path) -> None:
    again = _build(tmp_path / "again")
    assert not again.cached
    assert again.summary["digest"] == built.summary["digest"]


def test_a_killed_build_goes_on_with_its_texts(built: BuiltDataset, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from tests.training.data.test_build import _build; "
        f"_build(Path({str(tmp_path / 'data')!r}))"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "server"), str(ROOT / "training")])
    building = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        # The user prompts are there, the answers are being written.
        deadline = time.monotonic() + 240
        while not (kept := list(tmp_path.glob(".data.texts-*/0000-*.json"))):
            assert building.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        building.kill()
        building.wait()
    assert not (tmp_path / "data").exists()
    # What the next run finds there is what it takes.
    rows = json.loads(kept[0].read_text())
    marked = "Which tree in the old village park is the tallest one?"
    kept[0].write_text(json.dumps([[marked, True, [1]], *rows[1:]]))
    again = _build(tmp_path / "data")
    assert marked in {row.messages[0].content for row in _rows(again.path)}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert again.summary["counts"].keys() == built.summary["counts"].keys()


def test_a_model_without_a_template_writes_after_the_plain_one(
    built: BuiltDataset, tmp_path: Path
) -> None:
    plain = _build(tmp_path / "plain", chat_template="plain")
    assert plain.summary["chat_template"] == "plain"
    # A dataset from before there was a choice is still found.
    assert "chat_template" not in built.summary
    assert all("<|im_" not in row.response for row in _rows(plain.path))
    assert plain.summary["digest"] != built.summary["digest"]


def test_other_inputs_do_not_replace_a_dataset_unasked(built: BuiltDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset of other inputs"):
        _build(built.path, seed=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="other files"):
        _build(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_vllm_writes_texts_too() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    assert _continue("vllm") == _continue("transformers")


def _continue(backend: Backend) -> list[tuple[str, tuple[int, ...]]]:
    from circuit_breakers.models import resolve_model

    path = resolve_model(MODEL).path
    with open_generator(
        path, backend, seed=0, max_model_len=128, chat_template="model"
    ) as generate:
        prompts = ["The capital of France is", "One, two, three, four,", "A B C D E F"]
        requests = [
            Request(
                prompt_ids=tuple(generate.tokenizer.encode(prompt)),
                max_new_tokens=4,
                temperature=0.0,
                stop_id=generate.tokenizer.eos_token_id,
            )
            for prompt in prompts
        ]
        written = generate(requests, "test")
        assert all(generate.tokenizer.decode(one.ids) == one.text for one in written)
        return [(one.text, one.ids) for one in written]


def test_a_model_that_vllm_cannot_load_is_an_error(tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from circuit_breakers.models import resolve_model

    path = resolve_model(MODEL).path
    for file in path.iterdir():
        if file.name != "model.safetensors" and file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 16)
    with (
        pytest.raises(ModelError, match="vLLM process that stopped with exit code"),
        open_generator(tmp_path, "vllm", seed=0, max_model_len=128, chat_template="model"),
    ):
        pass


def test_a_changed_file_is_refused(built: BuiltDataset, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in built.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    load_dataset(copy)
    lines = (copy / "test.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    row["label"] = "benign" if row["label"] == "harmful" else "harmful"
    lines[0] = json.dumps(row)
    (copy / "test.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"test\.jsonl: got sha256 .* changed after the build"):
        load_dataset(copy)
    with pytest.raises(DataError, match="changed after the build"):
        _build(copy)
