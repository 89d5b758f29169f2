"""Serves a web page on which people rank, rate and correct answers, and makes training rows from their decisions."""
