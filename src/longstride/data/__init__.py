"""Files: atomic writes, manifests, checkpoints, frames and shards."""
