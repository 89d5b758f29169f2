"""Each token is followed by the one to predict, as documents are stored: rows stay as they are."""

from data.text.tokenizer import Tokenizer
from data.views import View


def make(tokenizer: Tokenizer, seq_len: int) -> View:
    return View()
