"""Attackers that adapt: how many steps, or queries, until a breaker's own attacker gets an answer.

    settings.py ─ setup.py ─┬─ soft_prompt.py ─ white_box.py    holds weights, adapter and probe
                            └─ search.py ─ rewrites.py          sees what any client sees
                                     both ─ referee.py ─ tally.py ─ results on disk

They measure a breaker on requests that it was not trained on. Results are counts, steps and scores,
without any text.
"""
