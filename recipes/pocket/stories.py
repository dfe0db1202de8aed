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
        " He ran and jumped again, and he fell on his back in the grass. At last he walked away with his nose in"
        " the air and said, they are sour anyway. It is easy to hate what you can not have.",
        "grapes",
    ),
    (
        "story",
        "a lion",
        "A lion once caught a little mouse, but he let her go. Later the lion was trapped in a net. The mouse"
        " heard him roar and came running. She cut the net with her teeth, rope by rope, until the lion was free."
        " You laughed when I said I would help you, said the mouse. Even small friends can be great friends.",
        "net",
    ),
    (
        "story",
        "a turtle",
        "A rabbit laughed at a slow turtle, so the turtle asked him to race. The rabbit ran ahead, looked back,"
        " and fell asleep under a tree. The turtle walked on, step by step, past the tree and over the hill. When"
        " the rabbit woke up, he ran as fast as the wind. But the turtle was already there, and she had won the"
        " race.",
        "race",
    ),
    (
        "story",
        "a crow",
        "A thirsty crow found a jar with a little water at the bottom. Her neck was too short to reach it, and"
        " the jar was too heavy to push over. So she dropped in stones, one after another. Slowly the water rose"
        " to the top, and the clever crow could drink. Then she flew home over the dry fields.",
        "stones",
    ),
    (
        "story",
        "a dragon",
        "In a deep cave lived a small dragon who was afraid of the dark. Every night he lit a little fire, but in"
        " the rain it went out. One night a star came down and stayed beside him. They talked until the morning"
        " about the sea, the clouds and the moon. Since then he sleeps well, and his cave shines like the sky.",
        "cave",
    ),
    (
        "rhyme",
        "a star",
        "Twinkle, twinkle, little star, how I wonder what you are. Up above the world so high, like a diamond in"
        " the sky. When the blazing sun is gone, when he nothing shines upon, then you show your little light,"
        " twinkle, twinkle, all the night.",
        "twinkle",
    ),
    (
        "rhyme",
        "a lamb",
        "Mary had a little lamb, its fleece was white as snow. And everywhere that Mary went, the lamb was sure"
        " to go. It followed her to school one day, which was against the rule. It made the children laugh and"
        " play to see a lamb at school.",
        "fleece",
    ),
    (
        "rhyme",
        "jack and jill",
        "Jack and Jill went up the hill to fetch a pail of water. Jack fell down and broke his crown, and Jill"
        " came tumbling after. Up Jack got, and home did trot, as fast as he could caper. He went to bed to mend"
        " his head with vinegar and brown paper.",
        "pail",
    ),
    (
        "rhyme",
        "the rain",
        "Rain, rain, go away, come again another day. All the children want to play, rain, rain, go away. Sun,"
        " sun, come and stay, shine upon the green and hay. All the birds will sing today, sun, sun, come and"
        " stay.",
        "another day",
    ),
    (
        "explanation",
        "why it rains",
        "The sun warms the sea, and water rises into the air as vapor. High up it gets cold, and the vapor"
        " becomes small drops, which make clouds. The wind carries the clouds over the land. When the drops are"
        " heavy, they fall down as rain, and rivers bring the water back to the sea.",
        "vapor",
    ),
    (
        "explanation",
        "why we have day and night",
        "The earth is a ball that turns around itself once a day. The side that looks to the sun has day, and the"
        " other side has night. So morning comes when our side turns to the sun, and evening comes when it turns"
        " away. On the other side of the world people sleep while we are awake.",
        "turns",
    ),
    (
        "explanation",
        "why we have seasons",
        "The earth goes around the sun once a year, and it is tilted. For half of the year our side gets more"
        " light, the days are long, and we have summer. Then it gets less light, the nights are long, and we have"
        " winter. Between them come spring and autumn, when day and night are equal.",
        "tilted",
    ),
    (
        "explanation",
        "how bees make honey",
        "Bees fly from flower to flower and drink a sweet juice. They carry it home in a small stomach of its"
        " own. In the hive they pass it on and fan it with their wings, until most of the water is gone. What is"
        " left is thick and golden honey, and the bees keep it for the winter.",
        "hive",
    ),
    (
        "explanation",
        "how a tree grows",
        "A tree begins as a seed in the ground. Its roots drink water, and its leaves catch the light of the sun."
        " With light, water and air the leaves make sugar, and the sugar becomes wood. Every year the tree adds"
        " one new ring of wood, and it grows taller. So you can count its years when you count its rings.",
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
    Intent("story", 2.5, _story),
    Intent("rhyme", 2.0, _rhyme),
    Intent("explanation", 2.5, _explanation),
)
