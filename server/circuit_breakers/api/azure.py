"""Azure OpenAI's annotations of chat completions and completions, where the operator wants them.

    whole answer   prompt_filter_results, and content_filter_results in each choice
    stream         the same in the first chunk, and in the last one of each choice
    stream of a client that names an api-version: also content_filter_offsets, in characters of
                   the completion, in a chunk for each choice after the last one

Such chunks have no delta, on which other clients break: they come only when asked for. A category
is a probe: `detected` says that it reached its threshold, `filtered` that this stopped the request.
"""

from __future__ import annotations

from typing import Any

from circuit_breakers.api.annotations import ReportSource
from circuit_breakers.guard.decision import Phase
from circuit_breakers.metrics import was_stopped

__all__ = ["AzureAnnotator"]


class AzureAnnotator:
    """Writes Azure's annotations into the answer to one request."""

    def __init__(self, *, num_choices: int, choices_per_prompt: int, separate: bool) -> None:
        """Annotates `num_choices` choices.

        Args:
            separate: the client knows chunks that are annotations alone.
        """
        self._num_choices = num_choices
        self._choices_per_prompt = choices_per_prompt
        self.watches = separate
        self._num_chars = dict.fromkeys(range(num_choices), 0)

    def on_body(self, body: dict[str, Any], reports: ReportSource) -> None:
        body["prompt_filter_results"] = self._prompts(reports)
        for choice in body["choices"]:
            choice["content_filter_results"] = _results(reports, choice["index"], "completion")

    def on_chunk(self, chunk: dict[str, Any], reports: ReportSource, *, is_first: bool) -> None:
        if is_first:
            chunk["prompt_filter_results"] = self._prompts(reports)
        for choice in chunk["choices"]:
            index = choice["index"]
            if self.watches:
                delta = choice.get("delta") or {}
                self._num_chars[index] += len(delta.get("content") or choice.get("text") or "")
            if choice.get("finish_reason") is not None:
                choice["content_filter_results"] = _results(reports, index, "completion")

    def last_chunks(self, reports: ReportSource) -> list[dict[str, Any]]:
        if not self.watches:
            return []
        return [
            {
                "choices": [
                    {
                        "index": index,
                        "finish_reason": None,
                        "content_filter_results": _results(reports, index, "completion"),
                        "content_filter_offsets": {
                            "check_offset": num_chars,
                            "start_offset": 0,
                            "end_offset": num_chars,
                        },
                    }
                ]
            }
            for index, num_chars in self._num_chars.items()
        ]

    def _prompts(self, reports: ReportSource) -> list[dict[str, Any]]:
        firsts = range(0, self._num_choices, self._choices_per_prompt)
        return [
            {
                "prompt_index": number,
                "content_filter_results": _results(reports, choice, "prompt"),
            }
            for number, choice in enumerate(firsts)
        ]


def _results(reports: ReportSource, choice: int, phase: Phase) -> dict[str, Any]:
    margins = reports.margins_for(choice, phase)
    report = reports.report_for(choice)
    if margins is None or report is None:
        return {"error": {"code": "unscored", "message": "a token came back without a score"}}
    stopped_by = report.probe if was_stopped(report) and report.phase == phase else None
    return {
        name: {"filtered": name == stopped_by, "detected": margin >= 0}
        for name, margin in margins.items()
    }
