"""Names of loops whose length only a run knows: training traces them in these scopes, planning counts their turns."""

MICRO_BATCHES = "micro_batches"  # of a step
LOSS_CHUNKS = "loss_chunks"  # of a micro-batch's tokens that count
