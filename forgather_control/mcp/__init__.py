"""The Model Context Protocol server: an AI assistant watches jobs, and controls them as far as it is allowed."""
