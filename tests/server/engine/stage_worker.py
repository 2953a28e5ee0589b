"""A CPU worker of one rank that makes the buffers which vLLM makes in a dry run only, and
skips on a CPU without compilation. Imported by its name in the worker's process.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class StageWorker(CPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        if hasattr(runner, "intermediate_tensors") and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens,
                dtype=runner.model_config.dtype,
                device=runner.device,
            )

    def pid(self) -> int:
        return os.getpid()
