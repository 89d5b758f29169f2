"""The view for predicting the next token. Documents are already stored in this form, so rows are unchanged."""

from data.text.tokenizer import Tokenizer
from data.views import View


def make(tokenizer: Tokenizer, seq_len: int) -> View:
    return View()
