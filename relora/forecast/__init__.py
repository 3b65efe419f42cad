"""A forecast of what a run will need, computed without running it: no data, no weights, almost no memory."""
