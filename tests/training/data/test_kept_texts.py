"""A killed build goes on with the texts that it had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.generate import Generated, Request
from circuit_breakers_training.data.kept_texts import KeepingGenerator, discard_texts, kept_texts


class Counting:
    """Writes the number of the text; fails when it is asked for the text number `end`."""

    tokenizer = None

    def __init__(self, end: int = 1000) -> None:
        self.num_written, self.closed, self.titles = 0, False, list[str]()
        self._end = end

    def __call__(self, requests: Sequence[Request], title: str) -> list[Generated]:
        self.titles.append(title)
        results = []
        for request in requests:
            if self.num_written == self._end:
                raise KeyboardInterrupt
            self.num_written += 1
            text = f"{request.prompt_ids[0]} \u00e9 {self.num_written}"
            results.append(Generated(text, self.num_written % 2 == 0, (self.num_written, 7)))
        return results

    def close(self) -> None:
        self.closed = True


def requests(*prompts: int) -> list[Request]:
    return [Request(prompt_ids=(p,), max_new_tokens=4, temperature=0.5, stop_id=2) for p in prompts]


def test_what_was_written_is_not_written_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), kept_texts(tmp_path / "data", "a" * 64) as kept:
        stopped = KeepingGenerator(Counting(end=5), kept, block=2)
        first = stopped(requests(1, 1, 1), "prompts")
        stopped(requests(8, 9, 8), "answers")

    source = Counting()
    with kept_texts(tmp_path / "data", "a" * 64) as kept:
        goes_on = KeepingGenerator(source, kept, block=2)
        assert goes_on(requests(1, 1, 1), "prompts") == first
        assert source.num_written == 0
        answers = goes_on(requests(8, 9, 8), "answers")
    # The block that was whole is the interrupted run's: texts 4 and 5 of it.
    assert [g.text.split()[-1] for g in answers] == ["4", "5", "1"]
    assert source.titles == ["answers, part 2 of 2"]
    goes_on.close()
    assert source.closed


def test_the_same_requests_again_are_other_texts(tmp_path: Path) -> None:
    generate = KeepingGenerator(Counting(), tmp_path, block=4)
    assert generate(requests(5, 6), "try") != generate(requests(5, 6), "another try")
    assert generate([], "nothing") == []


def test_other_requests_in_the_same_place_are_written(tmp_path: Path) -> None:
    KeepingGenerator(Counting(), tmp_path, block=4)(requests(5), "x")
    other = Counting()
    assert KeepingGenerator(other, tmp_path, block=4)(requests(6), "x")[0].text.startswith("6 ")
    assert other.num_written == 1


def test_a_broken_block_is_written_again(tmp_path: Path) -> None:
    KeepingGenerator(Counting(), tmp_path, block=4)(requests(5), "x")
    [block] = tmp_path.iterdir()
    block.write_bytes(b"")
    again = Counting()
    assert KeepingGenerator(again, tmp_path, block=4)(requests(5), "x")[0].text.startswith("5 ")
    assert again.num_written == 1


def test_texts_of_other_inputs_go(tmp_path: Path) -> None:
    out, more = tmp_path / "data[1]", tmp_path / "data[1].texts-x"
    for path, digest in ((out, "a"), (more, "a"), (out, "b")):
        with kept_texts(path, digest * 64) as kept:
            (kept / "0000.json").write_text("[]")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".data[1].texts-" + "b" * 16, ".data[1].texts-x.texts-" + "a" * 16]
    discard_texts(out)
    assert [path.name for path in tmp_path.iterdir()] == names[1:]


def test_one_build_of_a_directory_at_a_time(tmp_path: Path) -> None:
    with (
        kept_texts(tmp_path / "data", "a" * 64),
        pytest.raises(DataError, match="another process is building"),
        kept_texts(tmp_path / "data", "b" * 64),
    ):
        pytest.fail("both build it")
    with kept_texts(tmp_path / "data", "b" * 64) as kept:
        assert kept.is_dir()
    assert not list(tmp_path.iterdir()), "nothing is left where nothing was kept"
