"""The adapter: a LoRA that reroutes the representations of harmful answers (arXiv 2406.04313).

rows ─ batches ─ blank_prompts.py ─ packing.py, packed_attention.py   how a step's rows lie
                    │
base_model.py ─ lora.py ─ streams.py, parallel_streams.py             adapted and base stream
                    │
objective.py ─ batch_losses.py ─ optimizer_step.py                    one step
                    │
trainer.py ─ checkpoint.py, zero_state.py ─ heldout.py                a run, and what it reached
"""
