"""What travels between client and job: JSON-RPC text, the method table, addresses and TLS."""
