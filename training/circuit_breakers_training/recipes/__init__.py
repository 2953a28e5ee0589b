"""How a breaker is trained, as data.

<name>.toml ─ files.py ─ resolution.py ─ config.py     file, flags, one checked Recipe
                                             │
                    skeleton.py ─ memory.py ─ dry_run.py     what it would take, without weights
"""
