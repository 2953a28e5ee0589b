"""The release gate: may this breaker, on this server, be shipped?

    settings.py, target.py     what is asked, of which server, with which breaker and data
        │
    run.py ─ the checks, each a function from a Target to rows
        │      identity.py       the server has this very breaker, and it never saw the test data
        │      detection.py      the test split, scored by prefill
        │      live.py           harmful and benign requests, answered: asking.py, judging.py
        │      capability.py     what the artifact's own report says of perplexity
        │      overhead.py       beside an unguarded server
        │      conformance.py    openai's client, typed call by typed call
        │      bypass.py         what must be refused, asked for
        │      leaks.py          the server's counters from before the first request to now
        │
    rows.py ─ bars.toml        a figure, how many things it counts, and the bar it must keep
        │
    report.py                  gate.json, gate.html, a table

A check that cannot count anything fails, and so does one that was not run and not named by --skip.
"""
