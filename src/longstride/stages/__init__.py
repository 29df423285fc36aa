"""One module per pipeline stage: read inputs, call the science, write outputs."""
