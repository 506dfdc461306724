"""Cores by affinity and quota, and threads that wait without spinning."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from packllm.machine import cores

AFFINITY = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu.max": "odd"}, None),
        ({}, None),
    ],
)
def test_cores_are_what_affinity_and_quota_allow(tmp_path, files, quota):
    for name, said in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(said + "\n")
    assert cores(tmp_path) == (AFFINITY if quota is None else min(AFFINITY, quota))


@pytest.mark.parametrize(("program", "given", "found"), [
    ("import packllm, os; print(os.environ.get('OMP_WAIT_POLICY'))", None, "PASSIVE"),
    ("import packllm, os; print(os.environ.get('OMP_WAIT_POLICY'))", "ACTIVE", "ACTIVE"),
    ("import torch, packllm, os; print(os.environ.get('OMP_WAIT_POLICY'))", None, "None"),
])  # fmt: skip
def test_threads_wait_passively_where_packllm_comes_before_torch(program, given, found):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == found
