"""Retrieval: splits documents into chunks, indexes them by words and by vectors, and finds the chunks that are nearest
to a question."""
