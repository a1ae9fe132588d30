"""Where the Triton kernels run: on the GPU if there is one, else in Triton's interpreter.

Triton decides when the kernels are decorated, so the variable is set around the import, and only there: each test chooses
afterwards whether its CPU tensors go through the CPU path or through the interpreted kernels (see test_kernels.backend).
"""
import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if importlib.util.find_spec("triton"):
    import kernels.aggregation  # noqa: E402,F401
    import kernels.generator  # noqa: E402,F401

os.environ.pop("TRITON_INTERPRET", None)
