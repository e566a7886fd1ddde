"""seqio tasks, mixtures and vocabularies; installed as glmjax.tasks. Only the CLI imports it."""
