"""The client: find a job, connect to it over a socket, TCP, ssh or files, and call its methods."""
