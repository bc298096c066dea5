"""Parse the command line and run a command."""
