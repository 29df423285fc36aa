"""One seed per job, derived from the configured seed and the job's identity."""

from __future__ import annotations

import hashlib


def job_seed(config_seed: int, *identity: str | int) -> int:
    """Return a 63-bit seed that depends on the configured seed and on who is asking.

    Equation: the first 8 bytes of SHA-256("config_seed/identity[0]/identity[1]/..."), without the sign bit, so
    that neither the order in which jobs run nor the machine changes a random stream.

    Args:
        config_seed: `run.seed` of the configuration.
        identity: what distinguishes the job, such as ("sample", "alanine", "timewarp", 0).
    """
    text = "/".join(str(part) for part in (config_seed, *identity))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
