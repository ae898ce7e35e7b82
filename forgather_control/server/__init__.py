"""The control server: one thread for connections, dispatch, authentication and limits. Knows no command by name."""
