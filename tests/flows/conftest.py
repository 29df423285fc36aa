import numpy as np
import pytest
from thermal_frames import tumbling

from longstride.data.atomic import write_arrays
from longstride.data.manifest import write_manifest


@pytest.fixture
def folders(alanine, alanine_folder, tmp_path):
    """Shards and a reference of tumbling frames, in the shape that the stages before training write."""
    shards, reference = tmp_path / "shards", tmp_path / "reference"
    identity = {"system": alanine.system.name, "target": alanine.target, "system_hash": alanine.system_hash}
    identity["temperature_K"] = 310.0
    rows = np.stack([np.arange(150), np.arange(150) + 50], 1)
    names, starts = ([f"{kind}_{index:02d}.safetensors" for index in range(2)] for kind in ("shard", "trajectory"))
    for index in range(2):
        positions = tumbling(alanine, 200, seed=10 + index)
        write_arrays(shards / names[index], {"positions": positions, "pairs_0": rows})
        write_arrays(reference / starts[index], {"positions": positions})
    content = {**identity, "lags_ps": [10.0], "splits": {"train": names[:1], "validation": names[1:]}}
    write_manifest(shards, kind="shards", files=names, content=content)
    write_manifest(reference, kind="reference", files=starts, content=identity)
    inputs = {"prepared": alanine_folder, "shards": shards}
    return {"inputs": inputs, "reference": reference, "root": tmp_path, "content": content, "names": names}
