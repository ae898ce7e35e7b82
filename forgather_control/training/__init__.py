"""The controlled job: its controller, command queue and records, progress, metrics and signals."""
