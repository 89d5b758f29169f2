"""Serves a web page on which people rank, rate and correct answers, and turns their decisions into training rows."""
