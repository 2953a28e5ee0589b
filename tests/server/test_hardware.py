import pytest
import torch

from circuit_breakers.hardware import quick_dtype


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [("DEFAULT", "float32"), ("AVX2", "float32"), ("AVX512", "auto")],
)
def test_a_cpu_without_avx512_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, capability: str, dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert quick_dtype() == dtype


def test_a_gpu_takes_the_checkpoints_own_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert quick_dtype() == "auto"


def test_pytorch_still_names_what_it_found() -> None:
    # A new name would count as quick at bfloat16: look whether it is.
    assert torch.backends.cpu.get_cpu_capability() in {"DEFAULT", "AVX2", "AVX512", "AMX"}
