"""The laboratory of learning: arms x sizes x seeds x learning rates from one file, and the page of the outcome."""
