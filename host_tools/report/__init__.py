"""The report of a build: what its stages noted, as JSON and as one page that needs nothing else."""
