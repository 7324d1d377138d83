"""The doctor's report on machines that lack something."""

from __future__ import annotations

import resource
import shutil

import pytest

from iwm_fast.cli import machine
from iwm_fast.cli.main import main


def test_without_a_compiler_a_gpu_run_is_broken_and_a_cpu_run_is_not(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._compiler(on_gpu=True).broken
    on_cpu = machine._compiler(on_gpu=False)
    assert not on_cpu.broken
    assert "install gcc" in on_cpu.reason


def test_pythons_headers_are_looked_for_where_triton_includes_them(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda _name: str(tmp_path))
    found = machine._compiler(on_gpu=True)
    assert found.broken
    assert "python3-dev" in found.reason


def test_few_open_files_are_named_with_what_to_do():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        found = machine._open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "256 at a time" in found.reason
    assert "ulimit -n 4096" in found.reason


@pytest.mark.parametrize(("ranks", "short"), [(1, False), (10**9, True)], ids=["one rank", "more than fit"])
def test_shared_memory_is_checked_if_ranks_share_a_host(tmp_path, ranks, short):
    found = machine._shared_memory(tmp_path, ranks, on_gpu=True)
    assert found.broken is short
    assert ("--shm-size" in found.reason) is short


def test_a_nearly_full_disk_is_named(monkeypatch):
    full = shutil._ntuple_diskusage(total=10**12, used=10**12 - 10**6, free=10**6)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _path: full)
    assert "under 1 GB in the current folder" in machine._disk().reason


def test_the_doctor_ends_with_1_and_names_what_is_broken(monkeypatch, capsys):
    parts = [machine.Part("driver", None, False, "no answer", broken=True), machine.Part("disk", None, True, "room")]
    monkeypatch.setattr("iwm_fast.cli.doctor.examine", lambda: parts)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "iwm-fast doctor: broken: driver; the table says why\n"
