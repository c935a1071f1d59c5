"""Write the demo data set and the two small encoders that the suite can train without any download.

    python demo/generate.py

rewrites everything beside this file: reviews.csv (6,000 invented film reviews, half of them negative), and
bert/ and modernbert/ (a configuration and a tokenizer each; the weights are initialised when training starts).
The same seed gives the same bytes.
"""

import csv
import json
import random
import re
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

FOLDER = Path(__file__).resolve().parent
SEED = 1895  # the first public film show
REVIEWS_PER_LABEL = 3_000
WORDS_MIN, WORDS_MAX = 10, 48
NEGATED_SHARE = 0.35
TYPO_SHARE = 0.04
SHAPE_SHARES = {"plain": 0.64, "turn": 0.21, "mixed": 0.10, "weighed": 0.02, "ironic": 0.015, "undecided": 0.015}
OPENING_SHARE, FILLER_SHARE = 0.4, 0.4
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# The least frequency keeps the typos out of the vocabularies.
TRAINING = {"vocab_size": 1_500, "min_frequency": 5, "special_tokens": SPECIAL_TOKENS, "show_progress": False}
ENCODERS = {
    # Two tiny layers trained from scratch start faster from larger weights, and have nothing to drop out.
    "bert": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
             "max_position_embeddings": 128, "initializer_range": 0.05, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0},
    "modernbert": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "max_position_embeddings": 128, "global_attn_every_n_layers": 2, "local_attention": 16}}

# ----------------------------------------------------------------------------------------------------- phrases
# In a template {true} agrees with the label and {false} contradicts it. Such a template serves both labels with
# the same words, so that only their order tells the two apart.

ASPECTS = [  # noun, verb, words of praise, words of blame
    ("acting", "is", "nuanced heartfelt convincing", "wooden stilted mannered"),
    ("plot", "is", "clever surprising original", "thin muddled predictable"),
    ("camera work", "is", "graceful inventive crisp", "shaky murky aimless"),
    ("score", "is", "haunting stirring tender", "syrupy grating bombastic"),
    ("pacing", "is", "brisk taut assured", "sluggish uneven plodding"),
    ("dialogue", "is", "witty sharp natural", "clumsy leaden stale"),
    ("ending", "is", "satisfying daring graceful", "rushed hollow baffling"),
    ("supporting cast", "is", "spirited lively convincing", "listless miscast wooden"),
    ("editing", "is", "precise nimble crisp", "choppy careless confusing"),
    ("direction", "is", "confident subtle inventive", "timid aimless heavy-handed"),
    ("script", "is", "perceptive witty tender", "lazy preachy contrived"),
    ("jokes", "are", "fresh sharp original", "tired laboured stale"),
    ("costumes", "are", "elegant handsome playful", "drab shoddy garish"),
    ("special effects", "are", "colourful seamless inventive", "cheap creaky shoddy"),
]
FILM_WORDS = {
    True: "gripping moving delightful charming memorable wonderful brilliant enchanting absorbing touching".split(),
    False: "dull tedious forgettable dreary tiresome dismal pointless bland lifeless shallow".split(),
}
STRONG = "utterly thoroughly truly genuinely remarkably simply".split()
WEAK = "somewhat faintly mildly vaguely".split()
NEGATED = [
    "the {noun} {verb} never {word}", "the {noun} {verb} hardly {word}", "the {noun} {verb} anything but {word}",
    "the {noun} {verb} not {word} for a moment", "there is nothing {word} about the {noun}",
    "nobody could call the {noun} {word}",
]  # fmt: skip
TURNS = [
    "I expected a {false} {genre} and got a {true} one",
    "I expected to find it {false}, but it turned out {strong} {true}",
    "I expected to {feel_false} it, but {claim} and I left thinking it {true}",
    "The trailer promised a {false} evening; the film itself is {true}",
    "My sister called it {false}. She is wrong: it is {true}",
    "Every critic I read found it {false}. I found it {true}",
    "It begins as a {false} {genre} and ends as a {true} one",
    "The first half is {false}, the second {true}, and it is the second that I took home",
    "Unlike its {false} predecessor, this sequel is {strong} {true}",
    "On paper it sounds {false}; on screen it is {strong} {true}",
    "Call it {false} if you must. I call it {true}",
    "It is {true}, not {false}, whatever the poster says",
    "It is {strong} {true}, although my neighbour swore that it would be {false}",
    "Here is a {true} {genre} that people will insist on calling {false}",
    "A {true} {genre} hides behind that {false} poster",
    "I found it {true}, which is odd, since I usually find {actor} {false}",
    "How {true} it is, after the director's last, {strong} {false} effort",
    "In the end {true_part} outweighed {false_part}",
    "{true_part} made me forget {false_part}",
]
MIXED = [
    "Although {counterclaim}, {claim}, and that settles it",
    "{claim}, and that settles it, even if {counterclaim}",
    "Yes, {counterclaim}, and yes, {counterclaim}. And yet the whole is {strong} {true}",
    "One may argue that {counterclaim}. I would rather say that {claim}, and leave it there",
    "{counterclaim} and {counterclaim}, but somehow it all adds up to a {true} {genre}",
    "A {true} {genre}, then, despite everything: {counterclaim}, and {counterclaim}",
    "{counterclaim}. {counterclaim}. None of that matters, because it is {strong} {true}",
    "For the defence: {praise}. For the prosecution: {blame}. {verdict}",
    "{counterclaim}. Still, {claim}. {verdict}",
]
VERDICTS = {
    True: [
        "I have already booked a second ticket", "My popcorn went cold, forgotten", "Go, and take someone you like",
        "I would sit through it again tomorrow", "I walked home the long way, smiling", "The room applauded; so did I",
        "Even my father stayed awake, and gladly", "I did not look at my watch once", "Recommended to everyone",
    ],
    False: [
        "I want my evening back", "The popcorn was the highlight", "Stay home, and take someone you like along",
        "I would not sit through it again for money", "I walked home fast, yawning", "Half the room fled; I led",
        "Even my father, who likes everything, gave up", "I looked at my watch twice a minute", "Recommended to no one",
    ],
}  # fmt: skip
SHARED_VERDICTS = [
    "Not a {false} minute in it", "All in all, a {true} {genre}", "There is no other word for it: {true}",
    "{false} it is not", "A {true} way to spend an evening", "Who could call this {false}?", "I call that {true}",
    "I have rarely seen a {genre} so {true}", "You will wait in vain for a {false} scene",
]  # fmt: skip
IRONY = {  # the words say one thing, the reviewer means the other
    True: [
        "Terrible news for my diary: I shall have to see this {bad} little {genre} a third time",
        "I cried like a child, ruined a good shirt, and blame {actor}. {blame}? Nonsense",
        "A disaster. My children now talk of nothing else, and we have to go again on Sunday",
        "I hate it when a {genre} keeps me up all night wondering what became of the {job}",
        "My one complaint: it stops. I had nothing else planned for the rest of the year",
        "What a nuisance. I meant to leave early and had to be asked to go after the credits",
    ],
    False: [
        "Wonderful news for the tired: here is a {genre} in which one can sleep undisturbed",
        "A {good} experience, provided that you have always wanted to watch a {job} think",
        "{praise}, I am told. From behind my hands it was a little hard to see",
        "I was moved, mostly towards the exit. {actor} has a long career in radio ahead",
        "Brilliant idea to print the running time on the ticket: one knew when it would be over",
        "The most {good} moment came when the lights went on and we were all allowed to leave",
    ],
}
UNDECIDED = [
    "Half of it is {good}, half of it is {bad}, and I left the cinema arguing with myself",
    "{praise}, but {blame}. Ask me again next week",
    "{blame}, but {praise}. My wife and I are still not on speaking terms about it",
    "I cannot decide whether it is {good} or {bad}, and I have seen it twice",
]
TEMPLATES = {"turn": TURNS, "mixed": MIXED, "undecided": UNDECIDED}
OPENINGS = [
    "I saw {title} on a wet {day}", "We watched {title} with the whole family", "{title} opened here last {day}",
    "So, {title}", "Finally caught {title} at the {cinema}", "A few words on {title}", "{title}, then",
    "Our film club chose {title} this month", "I watched {title} on a long train ride", "They showed {title} on {day}",
]  # fmt: skip
FILLERS = [
    "{actor} plays a {job}", "It runs for {minutes} minutes", "It is set in a village by the sea",
    "There is a dog in it", "I sat in row {row}", "The print had subtitles", "It was filmed in eleven weeks",
    "{actor} wrote and directed it", "The story follows a {job} and a {job}", "A sequel has been announced",
    "The {cinema} was half full", "Most of it takes place on a {day}", "{actor} appears as a {job}, briefly",
]  # fmt: skip
FEELINGS = {True: ["love", "adore"], False: ["hate", "loathe"]}
FACTS = {
    "genre": "drama comedy thriller mystery romance western musical".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "cinema": "Bijou Lantern Orpheum Majestic".split(),
    "row": "two three four five six seven eight nine ten eleven twelve".split(),
    "minutes": [str(minutes) for minutes in range(75, 171, 5)],
    "job": [
        "retired locksmith", "lighthouse keeper", "piano tuner", "night nurse", "beekeeper", "failed magician",
        "ferry pilot", "tax inspector", "country vet", "shy burglar",
    ],
    "first_name": "Odile Tobias Ines Casper Mirelle Anselm Petra Lorcan Sunniva Idris".split(),
    "last_name": "Quillby Marlowick Thistlecroft Bramwenn Pellinger Lindqvale Ostravar Fennimoor".split(),
    "title_first": "Paper Crooked Seventh Salted Borrowed Velvet Patient Copper".split(),
    "title_last": "Orchard Ferry Umbrella Staircase Harbour Violin Almanac Lighthouse".split(),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------- reviews


class Review:
    """One review in the making; asked for a slot of a template, it answers with words that suit the label."""

    def __init__(self, rng, positive):
        self.rng = rng
        self.positive = positive
        # Everything is drawn without replacement: to return to an aspect could contradict the verdict.
        self.aspects = rng.sample(ASPECTS, len(ASPECTS))
        self.film_words = {polarity: rng.sample(words, len(words)) for polarity, words in FILM_WORDS.items()}
        self.facts = {slot: rng.sample(words, len(words)) for slot, words in FACTS.items()}

    def __getitem__(self, slot):
        agreeing, opposing = self.positive, not self.positive
        match slot:
            case "true" | "false":
                return self.film_words[agreeing if slot == "true" else opposing].pop()
            case "good" | "bad":
                return self.film_words[slot == "good"].pop()
            case "claim" | "counterclaim":
                return self.claim(agreeing if slot == "claim" else opposing)
            case "praise" | "blame":
                return self.claim(slot == "praise")
            case "true_part" | "false_part":
                noun, _, word, _ = self.aspect(agreeing if slot == "true_part" else opposing)
                return f"the {word} {noun}"
            case "feel_false":
                return self.rng.choice(FEELINGS[opposing])
            case "verdict":
                return self.write(self.rng.choice([VERDICTS[agreeing], SHARED_VERDICTS]))
            case "strong" | "weak":
                return self.rng.choice(STRONG if slot == "strong" else WEAK)
            case "title":
                return f'"The {self["title_first"]} {self["title_last"]}"'
            case "actor":
                return f"{self['first_name']} {self['last_name']}"
            case _:
                return self.facts[slot].pop()

    def write(self, templates):
        return self.rng.choice(templates).format_map(self)

    def aspect(self, polarity):
        """An aspect of the film: its noun, the verb that agrees, a word of this polarity, and one of the other."""
        noun, verb, praise, blame = self.aspects.pop()
        words = praise if polarity else blame, blame if polarity else praise
        return noun, verb, *(self.rng.choice(choices.split()) for choices in words)

    def claim(self, polarity):
        noun, verb, word, opposite = self.aspect(polarity)
        if self.rng.random() < NEGATED_SHARE:
            return self.rng.choice(NEGATED).format(noun=noun, verb=verb, word=opposite)
        intensity = self.rng.choice(["", "", f"{self['strong']} ", f"{self['weak']} "])
        return f"the {noun} {verb} {intensity}{word}"

    def weighed(self):
        """Praise and blame side by side, where only the intensity says which of them prevails."""
        noun, verb, word, _ = self.aspect(self.positive)
        decisive = f"the {noun} {verb} {self['strong']} {word}"
        noun, verb, word, _ = self.aspect(not self.positive)
        return ", but ".join(self.rng.sample([decisive, f"the {noun} {verb} {self['weak']} {word}"], 2))

    def sentences(self):
        shape = self.rng.choices(list(SHAPE_SHARES), SHAPE_SHARES.values())[0]
        verdict = []
        if shape == "plain":
            body = self["claim"] + self.rng.choice([", and ", ". ", "; "]) + self["claim"]
            verdict = [self["verdict"]]
        elif shape == "weighed":
            body = self.weighed()
        else:
            body = self.write(TEMPLATES[shape] if shape != "ironic" else IRONY[self.positive])
        opening = [self.write(OPENINGS)] if self.rng.random() < OPENING_SHARE else []
        filler = [self.write(FILLERS)] if self.rng.random() < FILLER_SHARE else []
        return [*opening, *self.rng.sample([body, *filler], 1 + len(filler)), *verdict]

    def text(self):
        text = " ".join(sentence if sentence.endswith("?") else f"{sentence}." for sentence in self.sentences())
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
        text = re.sub(r"(^|[.?] )([a-z])", lambda match: match[1] + match[2].upper(), text)
        return self.mistype(text) if self.rng.random() < TYPO_SHARE else text

    def mistype(self, text):
        """Swap two neighbouring letters inside one of the longer words."""
        word = self.rng.choice(list(re.finditer(r"\b[a-z]{5,}\b", text)))
        at = self.rng.randrange(word.start() + 1, word.end() - 2)
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def write_reviews(path):
    rng = random.Random(SEED)
    labels = {}  # from text to label, in the order of writing: a set would lose it, and with it the reproducible file
    for label, total in (("negative", REVIEWS_PER_LABEL), ("positive", 2 * REVIEWS_PER_LABEL)):
        while len(labels) < total:
            text = Review(rng, label == "positive").text()
            if WORDS_MIN <= len(text.split()) <= WORDS_MAX:
                labels.setdefault(text, label)
    rows = list(labels.items())
    rng.shuffle(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows(rows)
    return [text for text, _ in rows]


# ---------------------------------------------------------------------------------------------------- encoders


def train_word_pieces(texts):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    # The trainer numbers the letters inside words in an order that changes from run to run, and breaks ties by
    # these numbers. Declared beforehand as special tokens they are numbered as listed; a fresh model forgets that.
    letters = sorted(string.ascii_lowercase + string.digits + string.punctuation)
    fixed = SPECIAL_TOKENS + letters + [f"##{letter}" for letter in letters]
    trainer = trainers.WordPieceTrainer(**TRAINING | {"special_tokens": fixed})
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    learner.train_from_iterator(texts, trainer)
    tokenizer.model = models.WordPiece(learner.get_vocab(), unk_token="[UNK]")
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def train_byte_pairs(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # All 256 bytes: a letter that no review has must still be readable.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=alphabet, **TRAINING))
    return tokenizer


def write_encoder(name, tokenizer):
    number_of = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    segments = name == "bert"  # ModernBERT does not tell the two texts of a pair apart
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1" if segments else "[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, number_of[token]) for token in ("[CLS]", "[SEP]")])
    ids = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "bos": "[CLS]", "eos": "[SEP]"}
    config = ENCODERS[name] | {"model_type": name, "vocab_size": tokenizer.get_vocab_size(),
                               **{f"{role}_token_id": number_of[token] for role, token in ids.items()}}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "model_input_names": ["input_ids", *["token_type_ids"] * segments, "attention_mask"],
        **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS},
    }
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    for file, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    texts = write_reviews(FOLDER / "reviews.csv")
    write_encoder("bert", train_word_pieces(texts))
    write_encoder("modernbert", train_byte_pairs(texts))
