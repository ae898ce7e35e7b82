"""The command line: its parser, one function for each verb, and its output."""
