"""The paths that a call of the operators can take, for tests to run on each."""
import contextlib
import importlib.util
import os
from unittest import mock

import torch

from interpreter import watched

BACKENDS = ("cpu", "triton") if importlib.util.find_spec("triton") else ("cpu",)


@contextlib.contextmanager
def backend(name):
    """The device to test on; every output starts as NaN.

    Inside "triton", where there is no GPU, CPU tensors take the interpreted Triton kernels, which are watched.
    """
    interpret = name == "triton" and not torch.cuda.is_available()
    # Parts of Triton are imported on their first use, and ask then whether it interprets.
    environment = dict(ELSA_BACKEND="triton", TRITON_INTERPRET="1") if interpret else {}
    torch.use_deterministic_algorithms(True)  # also fills what torch.empty returns with NaN
    try:
        with mock.patch.dict(os.environ, environment), watched() if interpret else contextlib.nullcontext():
            yield torch.device("cuda" if name == "triton" and torch.cuda.is_available() else "cpu")
    finally:
        torch.use_deterministic_algorithms(False)
