"""Where the Triton kernels run, on the GPU if there is one, else in Triton's interpreter; and the number of threads.

Triton decides when the kernels are decorated, so the variable is set around the import of all of them, and only there:
each test chooses afterwards whether its CPU tensors go through the CPU path or through the interpreted kernels, see
backends.backend.
"""
import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if importlib.util.find_spec("triton"):
    import kernels.aggregation
    import kernels.convolution  # noqa: F401
os.environ.pop("TRITON_INTERPRET", None)

# Test processes share the cores, and so do the processes that they start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
