"""Each process logs in as a role of its own, which can do its work and nothing else."""
