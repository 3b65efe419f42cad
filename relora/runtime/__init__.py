"""What surrounds the loop: engines, checkpoints, metrics, evaluation, export."""
