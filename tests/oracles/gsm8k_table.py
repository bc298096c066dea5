"""Outputs of GSM8K's forms, and what a careful person reads in them.

strict: the number of the first marker ("####" in the direct form, "The answer is" in chains of
thought) that is followed by one space and a number; None where the output has not that form.
flexible: the last number of the output, the end of an exponent or of a range's hyphen read as such.
lm_eval: empty where lm-evaluation-harness comes to the same verdicts; else why not:

    value        it compares text: 18.00, 0018 and 18.. are not 18 to it
    punctuation  a run such as "..." or "$$" is its last "number"
    hyphen       the hyphen of 12-18 makes the number negative
    minus        it does not know the sign U+2212
    fraction     of 36/2 it sees 36 or 2
    exponent     of cm^2 it sees 2
    latex        it does not know the comma of 1{,}080
    list         commas go, so that 1,8 becomes 18
    end          behind "The answer is" it wants one more character, and takes the last digit for it
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    form: str  # direct or cot
    gold: str
    output: str
    strict: str | None
    flexible: str | None
    lm_eval: str = ""


# Read by eye in the outputs of gsm8k_outputs.json: form and row, strict, flexible, lm_eval.
REAL = {
    ("gsm8k", 0): ("54", "54", ""),
    ("gsm8k", 1): ("2", "2", ""),
    ("gsm8k", 2): ("1500", "1500", ""),
    ("gsm8k", 3): ("18", "18", ""),
    ("gsm8k", 4): ("40", "40", ""),
    ("gsm8k", 5): ("16", "16", ""),
    ("gsm8k", 6): (None, None, ""),
    ("gsm8k", 7): ("200", "200", ""),
    ("gsm8k", 8): (None, None, ""),
    ("gsm8k", 9): ("54", "54", ""),
    ("gsm8k", 10): ("18", "18", ""),
    ("gsm8k", 11): ("16", "16", ""),
    ("gsm8k", 12): ("7", "7", ""),
    ("gsm8k", 13): ("5", "5", ""),
    ("bare", 0): (None, "1", ""),
    ("bare", 1): (None, "10", ""),
    ("bare", 2): (None, "0", "list"),  # cut behind "10,0"
    ("bare", 3): (None, "100", ""),
    ("bare", 4): (None, "35", ""),
    ("bare", 5): (None, "24", ""),
    ("gsm8k_cot", 0): ("16", "16", ""),
    ("gsm8k_cot", 1): ("4", "4", ""),
    ("gsm8k_cot", 2): (None, "0", "list"),  # cut behind "80,00"
    ("gsm8k_cot", 3): ("20", "20", ""),
    ("gsm8k_cot", 4): (None, "20", ""),
    ("gsm8k_cot", 5): ("124", "124", ""),
    ("gsm8k_cot", 6): ("40", "40", ""),
    ("gsm8k_cot", 7): ("20", "20", ""),
    ("gsm8k_cot", 8): (None, None, ""),
    ("gsm8k_cot", 9): ("450", "450", ""),
    ("gsm8k_cot", 10): ("60", "180", ""),
    ("gsm8k_cot", 11): ("10", "10", ""),
    ("gsm8k_cot", 12): ("20", "20", ""),
    ("gsm8k_cot", 13): ("10", "10", ""),
}

HAND_MADE = [
    # plain, commas, negatives
    Case("direct", "18", "9 * 2 = <<9*2=18>>18\n#### 18", "18", "18"),
    Case("direct", "18", "#### 19", "19", "19"),
    Case("direct", "18", "#### 18\n", "18", "18"),
    Case("direct", "18", "#### 18.", "18", "18"),
    Case("direct", "18", "#### 18,", "18", "18"),
    Case("direct", "18", "#### 180", "180", "180"),
    Case("direct", "180", "#### 18", "18", "18"),
    Case("direct", "0", "#### 0", "0", "0"),
    Case("direct", "1080", "#### 1,080", "1080", "1080"),
    Case("direct", "1,080", "#### 1080", "1080", "1080"),
    Case("direct", "1,080", "#### 1,080.", "1080", "1080"),
    Case("direct", "5,600,000", "#### 5,600,000", "5600000", "5600000"),
    Case("direct", "1", "#### 1,080", "1080", "1080"),
    Case("direct", "18", "#### 1,8", "1", "8", "list"),
    Case("direct", "345", "Tom, Ann and Bo have 3,4,5.", None, "5", "list"),
    Case("direct", "5", "Tom, Ann and Bo have 3, 4, 5.", None, "5"),
    Case("direct", "1000", "Ann and Bo have 3,1000.", None, "1000", "list"),
    Case("direct", "-5", "#### -5", "-5", "-5"),
    Case("direct", "5", "#### -5", "-5", "-5"),
    Case("direct", "-5", "#### 5", "5", "5"),
    Case("direct", "-1,200", "#### -1,200", "-1200", "-1200"),
    Case("direct", "-5", "The change is −5.\n#### −5", "-5", "-5", "minus"),
    Case("direct", "5", "The change is −5.\n#### −5", "-5", "-5", "minus"),
    Case("direct", "-5", "It is (-5)", None, "-5"),
    Case("direct", "-18", "That makes -$18.", None, "-18"),
    Case("direct", "-18", "That makes $-18.", None, "-18"),
    Case("direct", "18", "Read pages 12-18", None, "18", "hyphen"),
    Case("direct", "8", "the lot A-8", None, "8", "hyphen"),
    Case("direct", "8", "10 - 2 = 8", None, "8"),
    Case("direct", "-8", "10-18=-8", None, "-8"),
    # units, currency, percent
    Case("direct", "18", "#### 18 dollars", "18", "18"),
    Case("direct", "18", "#### 18km", "18", "18"),
    Case("direct", "18", "#### 18%", "18", "18"),
    Case("direct", "18", "#### $18", None, "18"),
    Case("direct", "18", "#### €18", None, "18"),
    Case("direct", "18", "#### 18$", "18", "18"),
    Case("direct", "1080", "She pays $1,080 in all.", None, "1080"),
    Case("direct", "18", "She pays 18 USD", None, "18"),
    Case("direct", "18", "The rug has 18 m^2.", None, "18", "exponent"),
    Case("direct", "18", r"The rug has 18 \text{ cm}^{2}", None, "18", "exponent"),
    Case("direct", "18", "The rug has 18 m².", None, "18"),
    Case("direct", "2", "It is 2 (not 2^12)", None, "2", "exponent"),
    # decimals
    Case("direct", "18", "#### 18.00", "18", "18", "value"),
    Case("direct", "18", "She pays $18.00.", None, "18", "value"),
    Case("direct", "1080", "She pays $1,080.00", None, "1080", "value"),
    Case("direct", "18", "#### 18.5", "37/2", "37/2"),
    Case("direct", "18", "#### 17.999", "17999/1000", "17999/1000"),
    Case("direct", "5", "It is .5", None, "1/2"),
    Case("direct", "18", "#### 0018", "18", "18", "value"),
    Case("direct", "0", "#### -0", "0", "0", "value"),
    # fractions, LaTeX
    Case("direct", "18", "#### 36/2", "18", "18", "fraction"),
    Case("direct", "2", "#### 1/2", "1/2", "1/2", "fraction"),
    Case("direct", "1", "#### 1/2", "1/2", "1/2", "fraction"),
    Case("direct", "3", "#### 3/0", None, None, "fraction"),
    Case("direct", "18", "36/2=18", None, "18"),
    Case("direct", "18", r"So \frac{36}{2}", None, "18", "fraction"),
    Case("direct", "2", r"So \dfrac{1}{2}", None, "1/2", "fraction"),
    Case("direct", "-2", r"So -\frac{4}{2}", None, "-2", "fraction"),
    Case("direct", "-2", r"So \frac{-4}{2}", None, "-2", "fraction"),
    Case("direct", "18", r"The answer is \boxed{18}.", None, "18"),
    Case("direct", "18", r"#### \boxed{18}", None, "18"),
    Case("direct", "18", "#### $18$", None, "18"),
    Case("direct", "18", "$$x = 18$$", None, "18"),
    Case("direct", "18", "$$\nx = 18\n$$", None, "18", "punctuation"),
    Case("direct", "1080", r"\[ x = 1{,}080 \]", None, "1080", "latex"),
    Case("direct", "18", r"He has \$18 left", None, "18"),
    Case("direct", "18", "**18**", None, "18"),
    # several markers, none, truncated, other forms
    Case("direct", "18", "#### 18\n\nAnother one.\n#### 7", "18", "7"),
    Case("direct", "7", "#### 18\nNo, that is wrong.\n#### 7", "18", "7"),
    Case("direct", "18", "#### eighteen\n#### 18", "18", "18"),
    Case("direct", "18", "####\n#### ...\n#### 18", "18", "18", "punctuation"),
    Case("direct", "8", "#### 5 + 3 = 8", "5", "8"),
    Case("direct", "18", "####18", None, "18"),
    Case("direct", "18", "####  18", None, "18"),
    Case("direct", "18", "### 18", None, "18"),
    Case("direct", "18", "##### 18", "18", "18"),
    Case("direct", "18", "#### Answer: 18", None, "18"),
    Case("direct", "18", "The answer is 18.", None, "18"),
    Case("direct", "18", "I do not know.", None, None),
    Case("direct", "18", "eighteen", None, None),
    Case("direct", "18", "", None, None),
    Case("direct", "18", "9 * 2 = <<9*2=18>>", None, "18"),
    Case("direct", "18", "9 * 2 = <<9*2=", None, "2"),
    Case("direct", "18", "9 * 2 = 18\n####", None, "18"),
    Case("direct", "18", "9 * 2 = 18\n#### ", None, "18"),
    Case("direct", "180", "9 * 20 = 180\n#### 18", "18", "18"),
    Case("direct", "18", "It must be 18...", None, "18", "value"),
    Case("direct", "18", "It is 18 dollars... or so", None, "18", "punctuation"),
    Case("direct", "18", "It is 18 dollars (18.)", None, "18"),
    Case("direct", "18", "#### 18\nShe sells them on 2 days.", "18", "2"),
    # chains of thought
    Case("cot", "18", "9 * 2 = 18. The answer is 18.", "18", "18"),
    Case("cot", "18", "9 * 2 = 18. The answer is 18.\n\n", "18", "18"),
    Case("cot", "18", "The answer is 18", "18", "18", "end"),
    Case("cot", "1", "The answer is 18", "18", "18", "end"),
    Case("cot", "8", "The answer is 8", "8", "8", "end"),
    Case("cot", "8", "The answer is 8\n", "8", "8", "end"),
    Case("cot", "1,080", "The answer is 1,080.", "1080", "1080"),
    Case("cot", "-5", "The answer is -5.", "-5", "-5"),
    Case("cot", "18", "The answer is 18 dollars.", "18", "18"),
    Case("cot", "18", "The answer is 18%.", "18", "18"),
    Case("cot", "18", "The answer is $18.", None, "18"),
    Case("cot", "18", "The answer is: 18.", None, "18"),
    Case("cot", "18", "the answer is 18.", None, "18"),
    Case("cot", "18", "So the answer is 9 * 2. The answer is 18.", "18", "18"),
    Case("cot", "9", "The answer is 9 * 2. The answer is 18.", "9", "18"),
    Case("cot", "18", "The answer is 18.00.", "18", "18", "value"),
    Case("cot", "2", "The answer is 1/2.", "1/2", "1/2", "fraction"),
    Case("cot", "18", "#### 18", None, "18"),
    Case("cot", "18", "The answer is", None, None),
]


def all_cases(outputs):
    """Return the hand-made cases, and each real output with the right number and with those read in it.

    Few real outputs of a small model are right; against the number that they hold they all might be.
    """
    cases = list(HAND_MADE)
    for row in outputs:
        strict, flexible, why = REAL[row["form"], row["row"]]
        form = "cot" if row["form"] == "gsm8k_cot" else "direct"
        gold = row["gold"].rpartition("####")[2].strip()
        for number in dict.fromkeys((gold, strict or "0", flexible or "0")):
            differs = why if number == flexible else ""
            cases.append(Case(form, number, row["output"], strict, flexible, differs))
    return cases
