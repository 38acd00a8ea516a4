"""Re-ID protocols: which pictures are asked with and among which, what does not count, and how the result is told."""
