"""What is seqio's: vocabulary, sources, registered tasks; installed as glmjax.tasks. Gin files and users import it."""
