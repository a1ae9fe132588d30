"""Compiled kernels on the simulated GPU.

Triton decides when it is imported whether it interprets, and here it does, see conftest.py. So such tests run in a
process of their own, in which it compiles; it lives as long as this one.
"""
import concurrent.futures
import contextlib
import functools
import importlib
import multiprocessing
import os
from unittest import mock

import torch

from simulator import Device


def compiled(test):
    """Decorates a test: its body runs in a process where Triton compiles. Its arguments are plain data."""
    @functools.wraps(test)
    def run(*arguments, **options):
        return _process().submit(_call, test.__module__, test.__name__, arguments, options).result()
    return run


@functools.cache
def _process():
    return concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _call(module, name, arguments, options):
    return getattr(importlib.import_module(module), name).__wrapped__(*arguments, **options)


@contextlib.contextmanager
def simulated(capability, **options):
    """In this block CPU tensors go through the kernels, on a simulated GPU; every output starts as NaN -> Device."""
    torch.use_deterministic_algorithms(True)  # also fills what torch.empty returns with NaN
    try:
        with mock.patch.dict(os.environ, ELSA_BACKEND="triton"), Device(capability, **options) as device:
            yield device
    finally:
        torch.use_deterministic_algorithms(False)
