"""Training loops and losses of flows and students."""
