"""The command line: options in, results on stdout, progress and errors on stderr; it calls the same functions as the Python API."""
