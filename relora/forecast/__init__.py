"""What a run will need, reckoned without running it: no data, no weights, no memory to speak of."""
