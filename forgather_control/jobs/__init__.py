"""The jobs directory: job records, claims, liveness, clean-up, and request files."""
