"""What a run's process tells of errors."""

import pytest

from cogvx.runs import processes


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA error: out of memory"), "the GPU's memory is too small"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "the GPU's memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "the GPU's memory is too small"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), "the GPU's memory"),
        (MemoryError(), "this machine's memory (RAM) is too small"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "(RAM)"),
        (RuntimeError("pin_memory: CUDA error: out of memory"), "(RAM)"),
    ],
)
def test_every_lack_of_memory_is_said_with_what_helps(error, said):
    message, code = processes.explained(error)
    assert code == processes.FAILED and said in message


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), TypeError("out of memory")])
def test_other_errors_keep_their_traceback(error):
    assert processes.explained(error)[1] == 1
