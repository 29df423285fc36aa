"""Stage `shard`: trajectories → checksummed shards of lagged pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longstride.data.shards import write_shards

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.config import ShardConfig


def run(section: ShardConfig, *, reference: Path, out: Path) -> None:
    """Write shards and their manifest to `out`."""
    content = write_shards(
        reference,
        out,
        lags_ps=section.lags_ps,
        validation_fraction=section.validation_fraction,
        frames_per_shard=section.frames_per_shard,
    )
    for index, lag in enumerate(content["lags_ps"]):
        train, validation = (content["counts"][split][index] for split in ("train", "validation"))
        print(f"shards: {train} training and {validation} validation pairs at {lag:g} ps")
