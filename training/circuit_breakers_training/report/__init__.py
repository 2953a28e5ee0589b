"""What was measured, for people: report.html, report.md and plots, all from one mapping of metrics.

    metrics ─ contents.py ─ Document ─┬─ page.py ───── report.html   everything, in one file
       │      headline.py  adapter.py │
       │      probe.py     trips.py   ├─ markdown.py ─ report.md     the short form
       │      run.py       limits.py  └─ pictures.py ─ plots/*.png   beside report.md
       └───────────────────────────────── metrics.json               to make it all again

A section appears if what it needs was measured. Of the metrics, `name`, `model`, `probe` and `test`
have to be there; all else is optional:

    training_log    columns of the trainer's steps: step, retain_loss, retain_cosine, ...
    roc             false_positive_rate and true_positive_rate over all thresholds
    data_lengths    conversations of each split, and how many of them max_length cuts or drops
    calibration_groups  groups of the calibration's conversations: num, num_trips, upper_bound
    probe_fit       what the candidates were fitted on: conversations, repeats, tokens
    data_built      whether training built its data, with texts by the base model
    adapter         benign_ and harmful_cosine_by_source, and _by_layer
    perplexity, generations, selection, recipe, data_counts, data_sha256, created, adapter_sha256
    seconds, peak_rss_mib_by_stage, machine, peak_rss_mib, environment
    operating_points    [{target_fpr, threshold_logit, benign: a rate, harmful: a rate}], joined to
                        the calibration's curve; at the top or in `test`
    beyond_calibrated_length    {num_trips, num_tokens, rate_at_tokens: {tokens: {rate,
                        upper_bound}}}, extrapolated
    tokens_to_trip, tokens_until_trip, by_length, long_context, suites    see trips.py

Tables by source, category and length are made of the `benign_by_*` and `harmful_by_*` of `test`.
"""

from circuit_breakers_training.report.contents import build_document
from circuit_breakers_training.report.files import log_columns, report_files
from circuit_breakers_training.report.markdown import to_markdown
from circuit_breakers_training.report.page import to_html
from circuit_breakers_training.report.rebuild import rebuild_report

__all__ = [
    "build_document",
    "log_columns",
    "rebuild_report",
    "report_files",
    "to_html",
    "to_markdown",
]
