"""What this machine computes well."""

from typing import Literal

__all__ = ["load_dtype", "pick_device", "quick_dtype"]

# As PyTorch names what it found. AMX and the bfloat16 instructions come on top of AVX-512.
_WITHOUT_AVX512 = frozenset({"NO AVX", "DEFAULT", "AVX2"})


def pick_device() -> Literal["cuda", "cpu"]:
    """Where a model is trained, read and asked: on the GPU, if there is one."""
    import torch  # deferred: it takes seconds

    return "cuda" if torch.cuda.is_available() else "cpu"


def quick_dtype() -> Literal["auto", "float32"]:
    """How to load a checkpoint: "auto" is its own type; "float32" where that is quicker.

    A CPU without AVX-512 multiplies bfloat16 matrices at an eighth of the speed of float32 ones
    (9 against 78 GFLOP/s on one core). The weights take twice the memory; no result is less exact.
    """
    import torch  # deferred: it takes seconds

    if pick_device() == "cuda":
        return "auto"
    capability = torch.backends.cpu.get_cpu_capability()
    return "float32" if capability in _WITHOUT_AVX512 else "auto"


def load_dtype(setting: str) -> str:
    """What a checkpoint is loaded as under the setting `dtype`: "auto" takes the quick one."""
    return quick_dtype() if setting == "auto" else setting
