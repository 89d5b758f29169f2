"""Retrieval splits documents into chunks, indexes the chunks by words and by vectors, and finds the chunks that best
match a question."""
