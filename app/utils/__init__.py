"""Errors, files, console, arguments, signals, memory, text, class paths, package index."""
