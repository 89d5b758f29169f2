"""Marks of tests that need libtpu or the CUDA wheels."""

import importlib.util

import pytest

from tools.plan import topology

tpu = [
    pytest.mark.tpu,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make tpu"),
]
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not topology.cuda_installed(), reason="the CUDA wheels are not installed: make gpu"),
]
