"""Teachers that are no policy of the run: recorded before training, served by others, or of another tokenizer."""

from .cached import Cached
from .other_tokenizer import OtherTokenizer
from .remote import Remote

__all__ = ["Cached", "OtherTokenizer", "Remote"]
