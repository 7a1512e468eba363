"""What any training code needs: processes, logs, checkpoints, plots."""
