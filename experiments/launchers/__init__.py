"""Where the cells of a sweep run: on this machine (local) or as jobs of a Slurm cluster (slurm)."""
