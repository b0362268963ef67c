"""The folder of a run: checkpoints, results, records, checksums and lock."""
