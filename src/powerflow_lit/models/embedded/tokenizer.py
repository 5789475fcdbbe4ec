"""The embedded models' tokenizer: one token a word or number, text read back letter by letter.

A token carries the space before it, so that decoding is plain concatenation. There are no tokens
that the corpus does not use beyond the special ones: flattening (alpha < 1) gives every
never-seen token the square root of its probability, and a hundred of them would be noise.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNK, USER, END = "<|pad|>", "<|unk|>", "<|user|>", "<|end|>"
# words, numbers, "\boxed{", line breaks, then any single character; each with its leading space
WORD = r" ?\\boxed\{| ?[A-Za-z']+[,:]?| ?[0-9]+|\n| ?[^\sA-Za-z0-9]|\s"

# The base reads bare text, the instruct model a marked turn; both end a response with <|end|>.
BASE_TEMPLATE = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
INSTRUCT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ m['content'] + '" + END + "' }}"
    "{% else %}{{ '" + USER + "' + m['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
)


def build_tokenizer(texts: Iterable[str], *, instruct: bool) -> PreTrainedTokenizerFast:
    """Tokenizer whose vocabulary is exactly the words of `texts` and the special tokens."""
    splitter = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    special = (PAD, UNK, END, USER) if instruct else (PAD, UNK, END)
    vocabulary = {token: i for i, token in enumerate(special)}
    for text in texts:
        for word, _ in splitter.pre_tokenize_str(text):
            vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        additional_special_tokens=[USER] if instruct else [],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = INSTRUCT_TEMPLATE if instruct else BASE_TEMPLATE
    return fast
