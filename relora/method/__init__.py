"""ReLoRA itself: pure torch, usable in any training loop. Imports nothing else of this package."""
