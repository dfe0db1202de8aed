"""Long answers: a dozen short stories, rhymes and explanations of ten to thirty seconds of speech."""

from __future__ import annotations

from random import Random

from recipes.pocket.curriculum import Intent, Item

# (kind, topic as it is asked for, text, an accepted key answer)
LONG_ANSWERS: tuple[tuple[str, str, str, str], ...] = (
    (
        "story",
        "a fox",
        "Once a hungry fox saw sweet grapes on a high branch. He jumped and jumped, but he could not reach them."
        " At last he walked away and said, they are sour anyway.",
        "grapes",
    ),
    (
        "story",
        "a lion",
        "A lion once caught a little mouse, but he let her go. Later the lion was trapped in a net. The mouse"
        " heard him roar, came running, and cut the net with her teeth. Even small friends can be great friends.",
        "net",
    ),
    (
        "story",
        "a turtle",
        "A rabbit laughed at a slow turtle, so the turtle asked him to race. The rabbit ran ahead and fell asleep"
        " under a tree. The turtle walked on, step by step, and won the race.",
        "race",
    ),
    (
        "story",
        "a crow",
        "A thirsty crow found a jar with a little water at the bottom. She dropped in stones, one after another."
        " The water rose to the top, and the clever crow could drink.",
        "stones",
    ),
    (
        "story",
        "a dragon",
        "In a deep cave lived a small dragon who was afraid of the dark. One night a star came down and stayed"
        " beside him. Since then he sleeps well, and his cave shines like the sky.",
        "cave",
    ),
    (
        "rhyme",
        "a star",
        "Twinkle, twinkle, little star, how I wonder what you are. Up above the world so high, like a diamond in"
        " the sky.",
        "twinkle",
    ),
    (
        "rhyme",
        "a lamb",
        "Mary had a little lamb, its fleece was white as snow. And everywhere that Mary went, the lamb was sure to go.",
        "fleece",
    ),
    (
        "rhyme",
        "jack and jill",
        "Jack and Jill went up the hill to fetch a pail of water. Jack fell down and broke his crown, and Jill"
        " came tumbling after.",
        "pail",
    ),
    (
        "rhyme",
        "the rain",
        "Rain, rain, go away, come again another day. All the children want to play, rain, rain, go away.",
        "another day",
    ),
    (
        "explanation",
        "why it rains",
        "The sun warms the sea, and water rises into the air as vapor. High up it gets cold, and the vapor"
        " becomes small drops, which make clouds. When the drops are heavy, they fall down as rain.",
        "vapor",
    ),
    (
        "explanation",
        "why we have day and night",
        "The earth is a ball that turns around itself once a day. The side that looks to the sun has day, and the"
        " other side has night. So morning comes when our side turns to the sun.",
        "turns",
    ),
    (
        "explanation",
        "why we have seasons",
        "The earth goes around the sun once a year, and it is tilted. For half of the year our side gets more"
        " light, and we have summer. Then it gets less light, and we have winter.",
        "tilted",
    ),
    (
        "explanation",
        "how bees make honey",
        "Bees fly from flower to flower and drink a sweet juice. In the hive they pass it on and fan it with"
        " their wings, until the water is gone. What is left is thick and golden honey.",
        "hive",
    ),
    (
        "explanation",
        "how a tree grows",
        "A tree begins as a seed in the ground. Its roots drink water, and its leaves catch the light of the sun."
        " Every year the tree adds one new ring of wood, and it grows taller.",
        "ring",
    ),
)

_OF_KIND = {kind: [entry for entry in LONG_ANSWERS if entry[0] == kind] for kind in ("story", "rhyme", "explanation")}


def _draw(kind: str, rng: Random) -> Item:
    _, topic, text, answer = rng.choice(_OF_KIND[kind])
    return Item(topic, {"topic": topic, "text": text}, (answer,))


def _story(rng: Random) -> Item:
    return _draw("story", rng)


def _rhyme(rng: Random) -> Item:
    return _draw("rhyme", rng)


def _explanation(rng: Random) -> Item:
    return _draw("explanation", rng)


STORY_INTENTS: tuple[Intent, ...] = (
    Intent(
        "story",
        2.5,
        _story,
        (
            "tell me a story about {topic}.",
            "can you tell me a story about {topic}?",
            "please tell me a story about {topic}.",
            "i want to hear a story about {topic}.",
            "tell me a short story about {topic}.",
            "do you know a story about {topic}?",
            "a story about {topic}, please.",
        ),
        ("i would like a story about {topic}.", "could i hear a story about {topic}?"),
        ("{text}",),
    ),
    Intent(
        "rhyme",
        2.0,
        _rhyme,
        (
            "tell me a rhyme about {topic}.",
            "can you say a rhyme about {topic}?",
            "say the rhyme about {topic}.",
            "do you know a rhyme about {topic}?",
            "i want to hear the rhyme about {topic}.",
            "a rhyme about {topic}, please.",
        ),
        ("could i hear a rhyme about {topic}?", "i would like the rhyme about {topic}."),
        ("{text}",),
    ),
    Intent(
        "explanation",
        2.5,
        _explanation,
        (
            "explain {topic}.",
            "can you explain {topic}?",
            "tell me {topic}.",
            "please explain {topic}.",
            "do you know {topic}?",
            "i want to know {topic}.",
            "could you tell me {topic}?",
        ),
        ("would you explain {topic} to me?", "i wonder {topic}."),
        ("{text}",),
    ),
)
