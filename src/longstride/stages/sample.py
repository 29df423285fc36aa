"""Stage `sample`: one method, one system, one seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longstride.errors import LongstrideError

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.config import Config, Method


@dataclass(frozen=True, kw_only=True)
class SampleInputs:
    """Folders a sampling job reads; `reference`, `flow` and `distill` only where the method needs them."""

    prepared: Path
    reference: Path | None = None
    flow: Path | None = None
    distill: Path | None = None


def run(method: Method, config: Config, *, inputs: SampleInputs, out: Path, state: Path, seed: int, threads: int) -> None:
    """Run `method` and write samples and manifest to `out`.

    Raises:
        LongstrideError: an input that the method needs is not given.
    """
    job: dict[str, Any] = {
        "prepared": inputs.prepared,
        "reference": inputs.reference,
        "out": out,
        "state": state,
        "seed": seed,
        "threads": threads,
    }
    sections, physics = config.sample, config.physics
    if method not in ("timewarp", "explore"):
        _needed(inputs.reference, method, "--reference")
    if method == "md":
        from longstride.stages.sample_md import run_md

        run_md(sections.md, physics=physics, **job)
    elif method == "tuned-md":
        from longstride.stages.sample_tuned_md import run_tuned_md

        run_tuned_md(sections.tuned_md, physics=physics, **job)
    elif method == "metadynamics":
        from longstride.stages.sample_metadynamics import run_metadynamics_method

        run_metadynamics_method(sections.metadynamics, physics=physics, **job)
    elif method == "tempering":
        from longstride.stages.sample_tempering import run_tempering_method

        run_tempering_method(sections.tempering, physics=physics, **job)
    elif method in ("timewarp", "explore"):
        from longstride.stages.sample_flow import run_explore, run_timewarp

        flow = _needed(inputs.flow, method, "--flow")
        if method == "timewarp":
            run_timewarp(sections.timewarp, flow=flow, **job)
        else:
            run_explore(sections.explore, flow=flow, **job)
    else:
        from longstride.potentials.teachers import TeacherSpec
        from longstride.stages.sample_mts import run_mts, run_sts

        teacher = TeacherSpec.of(config.distill)
        if method == "mts":
            run_mts(sections.mts, distill=_needed(inputs.distill, method, "--distill"), teacher=teacher, **job)
        else:
            run_sts(sections.sts, teacher=teacher, **job)


def _needed(folder: Path | None, method: str, flag: str) -> Path:
    if folder is None:
        raise LongstrideError(f"method {method} needs {flag} DIR")
    return folder
