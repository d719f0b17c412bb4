"""GPUs shared out among jobs; none is here, so that a table stands in for what CUDA would list."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from l2p_utils.devices import claim, visible_devices, wait_for
from l2p_utils.files import UserError

ROOT = Path(__file__).parents[1]
TWO = {"0": "GPU-a", "1": "GPU-b"}
# a job: notes when it had which GPUs
JOB = """
import json, os, sys, time
start = time.time()
time.sleep(0.5)
print(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"], start, time.time()]))
"""
START = """
import sys, tempfile
from l2p_utils import devices
devices.visible_devices = lambda: {table}
devices.PAUSE = 0.02
tempfile.tempdir = {folder!r}
sys.exit(devices.main([{count!r}, "-c", {job!r}]))
"""


def start(folder, count=1, job=JOB, table=TWO):
    code = START.format(table=table, folder=str(folder), count=str(count), job=job)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_jobs_at_the_same_time_have_different_gpus(tmp_path):
    jobs = [start(tmp_path) for _ in range(5)]
    spans = {name: [] for name in TWO}
    for job in jobs:
        said, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors
        name, begin, end = json.loads(said)
        spans[name].append((begin, end))
    assert sum(map(len, spans.values())) == 5 and all(spans.values())
    for times in spans.values():
        times.sort()
        assert all(end <= begin for (_, end), (begin, _) in zip(times, times[1:], strict=False))


def test_a_job_of_several_gpus_waits_for_all_of_them(tmp_path):
    (held,) = [claim(1, TWO, tmp_path / f"l2p-gpus-{os.getuid()}")]
    assert held == ["0"]
    first = start(tmp_path)  # takes the other one
    assert json.loads(first.communicate(timeout=120)[0])[0] == "1"
    both = start(tmp_path, 2)
    with pytest.raises(subprocess.TimeoutExpired):
        both.wait(timeout=2)
    both.kill()
    both.communicate()


def test_a_killed_job_gives_its_gpu_back(tmp_path):
    only = {"0": "GPU-a"}
    folder = tmp_path / f"l2p-gpus-{os.getuid()}"
    job = start(tmp_path, job="print('here', flush=True); import time; time.sleep(600)", table=only)
    assert job.stdout.readline() == "here\n"
    assert claim(1, only, folder) is None
    job.kill()
    job.communicate()
    assert claim(1, only, folder) == ["0"]


def test_the_exit_status_is_the_commands(tmp_path):
    job = start(tmp_path, job="import sys; sys.exit(7)")
    job.communicate(timeout=120)
    assert job.returncode == 7


def test_more_gpus_than_there_are_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"needs 3 GPUs.* shows 2 \(0, 1\).*`processes`"):
        wait_for(3, TWO, tmp_path)
    job = start(tmp_path, 3)
    assert "needs 3 GPUs" in job.communicate(timeout=120)[1] and job.returncode == 1


def test_without_a_gpu_the_command_runs_as_it_is(tmp_path):
    job = start(tmp_path, job="import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))", table={})
    assert job.communicate(timeout=120)[0] == f"{os.environ.get('CUDA_VISIBLE_DEVICES')}\n"


def test_a_job_of_no_gpu_sees_none(tmp_path):
    job = start(tmp_path, 0, job="import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))")
    assert job.communicate(timeout=120)[0] == "''\n"


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["0", "1"]), ("3,5", ["3", "5"]), ("GPU-x, GPU-y", ["GPU-x", "GPU-y"])],
)
def test_gpus_are_called_as_they_were_given_and_known_by_their_own_id(monkeypatch, visible, names):
    """A batch system calls the one GPU that it lends "0" in every job: the id tells them apart."""

    class Properties:
        def __init__(self, number):
            self.uuid = f"id-{number}"

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    assert visible_devices() == dict(zip(names, ["id-0", "id-1"], strict=True))
