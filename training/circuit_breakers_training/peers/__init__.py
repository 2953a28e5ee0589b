"""Our guard beside others', on the same conversations in the same run: `bench guards`.

    settings.py                    what is asked, and what is skipped
        │
    dataset ─ cases.py             train, selection, calibration, test: who sees what, and when
        │
        ├─ text_guards.py          guards that read text: classifiers, a word list, packaged rules
        ├─ model_guards.py         guards that run the model: as a judge, our probe, our adapter
        │
    figures.py                     each guard's looks at each conversation, and one row of figures
        │
    run.py ─ report.py             guards.json, guards.html, a table

A guard that cannot be run has a row that says why, and no figures.
"""
