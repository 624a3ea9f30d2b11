"""Strategies for texts that try tokenizers hard."""

from hypothesis import strategies as st

from gemstill.text.tokenizer import SPACE
from gemstill.text.training import CONTROL

# Any code point but lone surrogates, assigned or not.
anything = st.text(st.characters(exclude_categories=["Cs"]))
# What merges depend on: words of the corpus, runs, line ends, control tokens and byte pieces spelled out.
PARTS = [
    *(
        "self",
        "return",
        "def",
        "parser",
        "Error",
        "the",
        "argument",
        "ing",
        "Äpfel",
        "булок",
        "散りぬる",
        "😀",
        "👩‍👩‍👧",
    ),
    *(
        " ",
        "  ",
        "   ",
        " " * 8,
        " " * 17,
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        "\r\r",
        "}",
        "\t",
        "\0",
        "\u2003",
        "\u3000",
        "\ufeff",
        "\U000e0001",
    ),
    *("a", "aa", "aaa", "abab", "--", "====", "((", "))", "_", "__", "0", "12", "1234567890", "\u0301", "\u0378"),
    *("<0x0A>", "<0x", "0A>", "⁇", " ⁇ ", "▅"),
]
composed = st.lists(st.sampled_from(PARTS) | anything.map(lambda text: text[:3]), max_size=30).map("".join)
spelled = st.lists(st.sampled_from([*CONTROL, *PARTS]), max_size=20).map("".join)
# U+2581 is how SentencePiece spells a space, and reads as one; `tokenizers` and `transformers` read
# control tokens in a text as such.
comparable = (anything | composed).filter(lambda text: not any(part in text for part in (SPACE, *CONTROL)))
every = anything | composed | spelled | st.lists(st.sampled_from([SPACE, " ", "a", "\n"]), max_size=12).map("".join)

# What Gemma's vocabulary has symbols for, and what would steer a model, whole and in halves.
STEERING = ["<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<unused7>", "[@BOS@]"]
SYMBOLS = ["<b>", "</b>", "<table>", "</table>", "<h1>", "<", "</", "b>", "<start_of", "_turn>", "unused7>"]
runs = st.tuples(st.sampled_from(" \n\t=-*#a"), st.integers(1, 70)).map(lambda run: run[0] * run[1])
symbols = st.lists(runs | st.sampled_from([*SYMBOLS, *PARTS]), max_size=16).map("".join)
steering = st.lists(runs | st.sampled_from([*STEERING, *SYMBOLS, *PARTS]), max_size=16).map("".join)
hard = (anything | composed | spelled | symbols | steering).filter(lambda text: SPACE not in text)


def steers(text: str) -> bool:
    """Does `text` spell a token that others read as a control token?"""
    return any(token in text for token in (*STEERING, *CONTROL)) or "<unused" in text
