"""The probe: linear on the residual stream of the adapted model; its threshold is a promise.

    fit_plan.py ─ fit_tokens.py ─ fit.py ─ selection.py     every candidate, and the best of them
    activations.py ───┘                        │
                     stages.py ─ calibration.py ─ evaluate.py, long_context.py

Train, selection, calibration and test are four splits; no conversation is in two of them.
"""
