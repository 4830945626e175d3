"""Whose scan is it: tables of scans and participants, and the names of files."""
