"""Word lists and sentence makers for `make_mini7.py`: grammar pairs, paragraphs and documents to copy."""

from __future__ import annotations

import random

NAMES = """Anna Ben Clara David Ella Frank Grace Henry Ivy Jack Kate Leo Maria Nick Olga Peter Rosa Sam
Tina Victor Wendy Adam Bella Carl Dora Emma Felix Gina Hugo Irene""".split()
THINGS = """apple boat candle drum egg flag glove hat island jar kite lamp mirror nail orange pencil queen
river stone table umbrella vase wheel basket cloud door engine feather garden horse iron ladder market
needle olive paper ring salt tower window""".split()
COLOURS = "red blue green yellow black white brown grey pink purple silver".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()
CITIES = """Paris London Rome Berlin Madrid Oslo Vienna Dublin Cairo Tokyo Boston Chicago Lisbon Prague
Athens Moscow Delhi Sydney Toronto Havana""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
JOBS = "doctor farmer teacher baker pilot nurse driver painter singer lawyer cook sailor tailor judge".split()
ANIMALS = "cat dog horse cow goat duck mouse rabbit lion bear fox wolf frog snake bird sheep".split()
ADJECTIVES = "new small heavy broken clean warm cold wet dry quiet sharp soft round plain".split()
VERBS = "sings sleeps dances waits cooks paints reads hides jumps counts whispers laughs".split()
MONTHS = "January February March April May June July August September October November December".split()

# -- grammar: each maker returns one (good, bad) pair that differs in one or two words -------------------

NOUNS = [
    ("dog", "dogs"),
    ("chair", "chairs"),
    ("picture", "pictures"),
    ("farmer", "farmers"),
    ("window", "windows"),
    ("child", "children"),
    ("key", "keys"),
    ("woman", "women"),
    ("letter", "letters"),
    ("neighbour", "neighbours"),
    ("shop", "shops"),
    ("house", "houses"),
    ("box", "boxes"),
    ("teacher", "teachers"),
    ("mouse", "mice"),
]


def _pick(rng: random.Random, items: list) -> tuple:
    """One of `items`, each of them a tuple."""
    return items[rng.randrange(len(items))]


def subject_verb(rng: random.Random) -> tuple[str, str]:
    """Agreement of be across a noun of the other number."""
    noun, other = rng.sample(NOUNS, 2)
    plural = rng.randrange(2)
    verbs = rng.choice([("is", "are"), ("was", "were")])
    place = rng.choice(["next to", "behind", "in front of"])
    end = rng.choice(["very old", "quite small", "still here", "not far away"])
    start = f"The {noun[plural]} {place} the {other[1 - plural]}"
    return f"{start} {verbs[plural]} {end}.", f"{start} {verbs[1 - plural]} {end}."


def verb_ending(rng: random.Random) -> tuple[str, str]:
    """The third-person ending of a full verb."""
    subject, plural = _pick(
        rng,
        [
            ("My sister", 0),
            ("My sisters", 1),
            ("Her uncle", 0),
            ("Her uncles", 1),
            ("The boy", 0),
            ("The boys", 1),
            ("Our cat", 0),
            ("Our cats", 1),
        ],
    )
    often = rng.choice(["often", "always", "never", "usually"])
    verb = rng.choice(["sleep", "play", "wait", "eat", "sit"])
    end = rng.choice(["in the garden", "behind the house", "in the kitchen", "at the window"])
    forms = (f"{subject} {often} {verb}s {end}.", f"{subject} {often} {verb} {end}.")
    return forms[plural], forms[1 - plural]


def determiner(rng: random.Random) -> tuple[str, str]:
    """this, that, these, those before a noun of the right number."""
    noun = _pick(rng, NOUNS)
    plural = rng.randrange(2)
    pair = rng.choice([("this", "these"), ("that", "those")])
    start = rng.choice(["I would like to paint", "She took a photo of", "We talked about", "They could not find"])
    return f"{start} {pair[plural]} {noun[plural]}.", f"{start} {pair[1 - plural]} {noun[plural]}."


def number_noun(rng: random.Random) -> tuple[str, str]:
    """A noun in the number that the word before it asks for."""
    noun = _pick(rng, [pair for pair in NOUNS if pair[1] not in ("mice",)])
    plural = rng.randrange(2)
    word = rng.choice(["two", "many", "several", "five"] if plural else ["one", "each", "every"])
    start = rng.choice(["There was a card for", "They had a plan for", "He made a list for"])
    return f"{start} {word} {noun[plural]}.", f"{start} {word} {noun[1 - plural]}."


def reflexive(rng: random.Random) -> tuple[str, str]:
    """A reflexive pronoun that agrees with its subject."""
    subject, good = _pick(
        rng,
        [
            ("The king", "himself"),
            ("The queen", "herself"),
            ("My father", "himself"),
            ("My mother", "herself"),
            ("His uncle", "himself"),
            ("The actress", "herself"),
            ("The old man", "himself"),
            ("Her aunt", "herself"),
            ("The boys", "themselves"),
            ("The two women", "themselves"),
            ("The cats", "themselves"),
            ("I", "myself"),
            ("We", "ourselves"),
            ("The men", "themselves"),
        ],
    )
    bad = rng.choice([word for word in ("himself", "herself", "themselves", "myself") if word != good])
    rest = rng.choice([("saw", "in the mirror"), ("hurt", "with a knife"), ("washed", "in the river")])
    return f"{subject} {rest[0]} {good} {rest[1]}.", f"{subject} {rest[0]} {bad} {rest[1]}."


def tense(rng: random.Random) -> tuple[str, str]:
    """A verb form that fits the time of the sentence."""
    who = rng.choice(["we", "they", "Anna and Ben", "my parents", "the pupils"])
    past, base = _pick(
        rng,
        [
            ("bought", "buy"),
            ("visited", "visit"),
            ("painted", "paint"),
            ("found", "find"),
            ("sold", "sell"),
            ("saw", "see"),
            ("drew", "draw"),
            ("built", "build"),
        ],
    )
    what = rng.choice(["a house", "a boat", "an old castle", "a small shop"])
    if rng.randrange(2):
        when = rng.choice(["Yesterday", "Last week", "Two years ago", "Last summer"])
        return f"{when} {who} {past} {what}.", f"{when} {who} will {base} {what}."
    when = rng.choice(["Tomorrow", "Next week", "Next summer"])
    return f"{when} {who} will {base} {what}.", f"{when} {who} {past} {what}."


def participle(rng: random.Random) -> tuple[str, str]:
    """The past participle after have, and the simple past without it."""
    part, past, rest = _pick(
        rng,
        [
            ("eaten", "ate", "the whole cake"),
            ("gone", "went", "to the market"),
            ("written", "wrote", "a long letter"),
            ("seen", "saw", "the new film"),
            ("taken", "took", "the wrong bus"),
            ("broken", "broke", "the blue plate"),
            ("given", "gave", "the dog a bone"),
            ("drunk", "drank", "all the milk"),
            ("sung", "sang", "a sad song"),
            ("begun", "began", "a new book"),
            ("known", "knew", "the answer"),
        ],
    )
    who = rng.choice(["she", "he", "my brother", "the girl"])
    if rng.randrange(2):
        return f"This time {who} has {part} {rest}.", f"This time {who} has {past} {rest}."
    return f"Last week {who} {past} {rest}.", f"Last week {who} {part} {rest}."


def word_order(rng: random.Random) -> tuple[str, str]:
    """Words in a possible and in an impossible order."""
    name, thing = rng.choice(NAMES), rng.choice(["car", "house", "ball", "coat", "bag", "boat"])
    colour, place = rng.choice(COLOURS[:8]), rng.choice(["London", "town", "the village", "Rome"])
    return rng.choice(
        [
            (f"{name} has a {colour} {thing} in {place}.", f"{name} has a {thing} {colour} in {place}."),
            (f"Where did {name} buy the {thing}?", f"Where {name} did buy the {thing}?"),
            (f"{name} does not like the {thing}.", f"{name} does like not the {thing}."),
            (f"{name} gave me the {colour} {thing}.", f"{name} me gave the {colour} {thing}."),
            (f"{name} is too tired to walk to {place}.", f"{name} is tired too to walk to {place}."),
            (f"The {thing} that {name} bought is {colour}.", f"The {thing} {name} that bought is {colour}."),
        ]
    )


def article(rng: random.Random) -> tuple[str, str]:
    """a before a consonant, an before a vowel."""
    good, bad = _pick(rng, [("an", "a"), ("a", "an")])
    vowel = ["apple", "egg", "orange", "umbrella", "old coat", "empty box", "onion", "iron bar", "open door"]
    consonant = ["book", "cat", "lemon", "green coat", "big box", "table", "wooden bar", "red door", "pear"]
    noun = rng.choice(vowel if good == "an" else consonant)
    start = rng.choice(["In the kitchen there was", "She looked at", "He dreamed of", "They were talking about"])
    return f"{start} {good} {noun}.", f"{start} {bad} {noun}."


def pronoun(rng: random.Random) -> tuple[str, str]:
    """Subject and object forms of pronouns."""
    subject, obj = _pick(rng, [("he", "him"), ("she", "her"), ("they", "them"), ("we", "us"), ("I", "me")])
    if rng.randrange(2):
        start = rng.choice(
            ["The teacher gave the book to", "Nobody was waiting for", "The dog ran after", "My aunt wrote a card to"]
        )
        return f"{start} {obj}.", f"{start} {subject}."
    end = rng.choice(["went home early", "opened the window", "could not sleep", "wanted to dance"])
    start = rng.choice(["After dinner", "In the evening", "Then"])
    return f"{start} {subject} {end}.", f"{start} {obj} {end}."


def comparison(rng: random.Random) -> tuple[str, str]:
    """Comparatives with -er and with more."""
    first, second = rng.sample(NAMES, 2)
    word, form = _pick(
        rng, [("tall", "taller"), ("old", "older"), ("fast", "faster"), ("young", "younger"), ("strong", "stronger")]
    )
    long = rng.choice(["beautiful", "careful", "famous", "intelligent", "patient"])
    if rng.randrange(2):
        return f"{first} is {form} than {second}.", f"{first} is more {form} than {second}."
    return f"{first} is more {long} than {second}.", f"{first} is {long}er than {second}."


def helper_verb(rng: random.Random) -> tuple[str, str]:
    """The form of a verb after do, can, to and prepositions."""
    name = rng.choice(NAMES)
    verb, form = _pick(
        rng,
        [
            ("sing", "singing"),
            ("swim", "swimming"),
            ("cook", "cooking"),
            ("read", "reading"),
            ("dance", "dancing"),
            ("draw", "drawing"),
        ],
    )
    return rng.choice(
        [
            (f"{name} does not want to {verb} today.", f"{name} does not want to {form} today."),
            (f"{name} cannot {verb} very well.", f"{name} cannot {form} very well."),
            (f"{name} is very good at {form}.", f"{name} is very good at {verb}."),
            (f"{name} never stops {form} in the evening.", f"{name} never stops {verb} in the evening."),
        ]
    )


GRAMMAR = [
    subject_verb,
    verb_ending,
    determiner,
    number_noun,
    reflexive,
    tense,
    participle,
    word_order,
    article,
    pronoun,
    comparison,
    helper_verb,
]

# -- copying: words that nothing but the text above them predicts -----------------------------------------


def _join(rng: random.Random, parts: list[str]) -> str:
    """Clauses as one paragraph with commas and full stops."""
    text = ", ".join(parts[:-1]) + rng.choice([" and ", ", then ", ", "]) + parts[-1]
    return text[0].upper() + text[1:] + "."


def owners(rng: random.Random) -> str:
    """Who has what."""
    names, things = rng.sample(NAMES, 6), rng.sample(THINGS, 6)
    return _join(rng, [f"{n} has the {rng.choice(COLOURS)} {t}" for n, t in zip(names, things, strict=True)])


def odd_sentences(rng: random.Random) -> str:
    """Sentences of random words."""
    things, animals = rng.sample(THINGS, 5), rng.sample(ANIMALS, 5)
    return " ".join(
        f"The {rng.choice(ADJECTIVES)} {a} {rng.choice(VERBS)} under a {rng.choice(COLOURS)} {t}."
        for a, t in zip(animals, things, strict=True)
    )


def journeys(rng: random.Random) -> str:
    """Who goes where on which day."""
    names, cities = rng.sample(NAMES, 5), rng.sample(CITIES, 5)
    return " ".join(
        f"{n} the {rng.choice(JOBS)} goes to {c} on {rng.choice(DAYS)}." for n, c in zip(names, cities, strict=True)
    )


def stock(rng: random.Random) -> str:
    """How many of what, where."""
    things = rng.sample(THINGS, 7)
    return (
        "In the shop we counted "
        + ", ".join(f"{rng.choice(NUMBERS)} {rng.choice(ADJECTIVES)} {rng.choice(COLOURS)} {t}s" for t in things)
        + "."
    )


def word_list(rng: random.Random) -> str:
    """Words without any order."""
    return " ".join(rng.sample(THINGS + ANIMALS + COLOURS[:10], 28)) + "."


PARAGRAPHS = [owners, odd_sentences, journeys, stock, word_list]


def address_book(rng: random.Random) -> str:
    """Name, job, town."""
    names, cities = rng.sample(NAMES, 9), rng.sample(CITIES, 9)
    return "List of members\n" + "\n".join(
        f"{n} is a {rng.choice(JOBS)} and lives in {c}" for n, c in zip(names, cities, strict=True)
    )


def timetable(rng: random.Random) -> str:
    """Day, subject, room."""
    topics = rng.sample(["music", "history", "sport", "art", "maths", "reading", "science", "cooking"], 7)
    return "Plan for the week\n" + "\n".join(
        f"{d} we have {t} with {n} in the {rng.choice(COLOURS)} room"
        for d, t, n in zip(DAYS, topics, rng.sample(NAMES, 7), strict=True)
    )


def shopping(rng: random.Random) -> str:
    """A shopping list with owners."""
    return "Things to bring back\n" + "\n".join(
        f"- {rng.choice(NUMBERS)} {rng.choice(ADJECTIVES)} {t}s for {n}"
        for t, n in zip(rng.sample(THINGS, 11), rng.sample(NAMES, 11), strict=True)
    )


def odd_poem(rng: random.Random) -> str:
    """A poem of random words."""
    return "A poem about nothing\n" + "\n".join(
        f"The {rng.choice(COLOURS)} {a} {rng.choice(VERBS)} with a {rng.choice(ADJECTIVES)} {t}"
        for a, t in zip(rng.sample(ANIMALS, 10), rng.sample(THINGS, 10), strict=True)
    )


def diary(rng: random.Random) -> str:
    """Birthdays and presents."""
    return "Birthdays to remember\n" + "\n".join(
        f"{m}: {n} wants a {rng.choice(COLOURS)} {t} from {c}"
        for m, n, t, c in zip(
            rng.sample(MONTHS, 8), rng.sample(NAMES, 8), rng.sample(THINGS, 8), rng.sample(CITIES, 8), strict=True
        )
    )


DOCUMENTS = [address_book, timetable, shopping, odd_poem, diary]
