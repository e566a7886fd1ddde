"""Cards: what a checkpoint is, what it cost, what it takes, and what of that is known by evidence."""
