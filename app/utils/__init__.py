"""Errors, files, console, arguments, signals, memory."""
