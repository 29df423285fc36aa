"""Write envs/requirements.lock from the environment that runs this: everything longstride[dev] needs, one pin each.

No index, no hashes, no local version labels (torch 2.13.0, not 2.13.0+cpu), so that pip offers the build that suits
the machine. Packages that exist on some machines only (the CUDA libraries of torch) are left to pip.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEADER = """# Every package of the environment, pinned; tested with Python 3.11. Written by `make lock`.
"""
MACHINE_DEPENDENT = ("nvidia-", "cuda-", "triton")


def needed(root: str, extra: str) -> set[str]:
    """Return the canonical names of everything `root[extra]` requires here, directly or not."""
    seen: set[tuple[str, str]] = set()
    waiting = [(root, extra), (root, "")]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        for text in importlib.metadata.distribution(name).requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                child = canonicalize_name(requirement.name)
                waiting += [(child, ""), *((child, option) for option in requirement.extras)]
    return {name for name, _ in seen} - {root}


def main() -> None:
    """Write the lock beside this file."""
    names = sorted(name for name in needed("longstride", "dev") if not name.startswith(MACHINE_DEPENDENT))
    pins = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}\n" for name in names]
    target = Path(__file__).with_name("requirements.lock")
    target.write_text(HEADER + "".join(pins))
    print(f"{target}: {len(pins)} packages")


if __name__ == "__main__":
    main()
