"""What stands before the encoder in the HTTP API: admission, batches, uploads, errors, metrics."""
