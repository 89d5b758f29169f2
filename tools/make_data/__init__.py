"""Instruction data from documents: questions and answers by a model or by templates, filtered and decontaminated."""
