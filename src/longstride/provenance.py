"""Where a result came from: versions, commit, hardware."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "longstride", "numpy", "scipy", "pandas", "torch", "openmm", "mdtraj", "deeptime", "pyemma", "tblite", "ase", "snakemake",
)  # fmt: skip


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that numbers depend on ("absent" where not installed)."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


@functools.cache
def commit() -> str:
    """Return the git commit of this source tree with "+changes" if edited, or "unknown"."""
    root = Path(__file__).parent
    try:
        run = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=10, check=True)
        head = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        edited = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head}+changes" if edited else head


@functools.cache
def hardware() -> dict[str, Any]:
    """Return processor, cores, memory and, where torch is loaded, the GPU."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"processor": model, "cores": os.cpu_count(), "memory_GiB": round(memory, 1), "gpu": _gpu_name()}


def _gpu_name() -> str:
    try:
        import torch
    except ImportError:
        return "none"
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"


def provenance() -> dict[str, Any]:
    """Return everything above as one JSON value, for manifests."""
    return {"commit": commit(), "versions": versions(), "hardware": hardware(), "platform": platform.platform()}
