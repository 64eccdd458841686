"""Training: the driver, what one worker does, snapshots, checkpoints."""
