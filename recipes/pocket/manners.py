"""Manners, and what is not understood: greetings, thanks, who are you; questions outside the list; sounds."""

from __future__ import annotations

from random import Random

from recipes.pocket.curriculum import Intent, Item
from recipes.pocket.words import FIRST_NAMES, NOUNS


def _nothing(rng: Random) -> Item:
    del rng
    return Item("", {})


def _simple(
    name: str,
    phrasings: tuple[str, ...],
    test_phrasings: tuple[str, ...],
    replies: tuple[str, ...],
    answers: tuple[str, ...],
    weight: float = 1.0,
) -> Intent:
    return Intent(name, weight, _nothing, phrasings, test_phrasings, replies, answers=answers)


MANNERS_INTENTS: tuple[Intent, ...] = (
    _simple(
        "greeting",
        (
            "hello.",
            "hi.",
            "hello there.",
            "hi there.",
            "good day.",
            "hey there.",
            "hello, nice to meet you.",
            "hi, i am here.",
            "greetings.",
        ),
        ("hello, my friend.", "hi again."),
        ("Hello! How can I help you?", "Hello! Nice to meet you."),
        ("hello",),
    ),
    _simple(
        "good_morning",
        (
            "good morning.",
            "good morning to you.",
            "a very good morning.",
            "morning.",
            "hello, good morning.",
            "good morning, how nice to hear you.",
        ),
        ("hi, good morning.", "good morning, my friend."),
        ("Good morning! How can I help you?",),
        ("good morning",),
        0.6,
    ),
    _simple(
        "good_evening",
        (
            "good evening.",
            "good evening to you.",
            "a very good evening.",
            "hello, good evening.",
            "evening.",
            "good evening, how nice to hear you.",
        ),
        ("hi, good evening.", "good evening, my friend."),
        ("Good evening! How can I help you?",),
        ("good evening",),
        0.6,
    ),
    _simple(
        "who_are_you",
        (
            "who are you?",
            "what is your name?",
            "what's your name?",
            "tell me your name.",
            "what are you called?",
            "may i ask who you are?",
            "what are you?",
            "do you have a name?",
        ),
        ("who am i talking to?", "can you tell me your name?"),
        ("My name is Duologue. I am a spoken chatbot.", "I am Duologue, a spoken chatbot."),
        ("duologue",),
        1.5,
    ),
    _simple(
        "how_are_you",
        (
            "how are you?",
            "how are you today?",
            "how are you doing?",
            "how do you do?",
            "how is it going?",
            "how's it going?",
            "are you well?",
            "how do you feel today?",
        ),
        ("how have you been?", "are you doing well today?"),
        ("I am very well, thank you. How are you?", "I am very well, thank you."),
        ("very well",),
    ),
    _simple(
        "user_is_well",
        (
            "i am fine.",
            "i'm fine, thank you.",
            "i am very well.",
            "i feel good today.",
            "i'm doing well.",
            "i am great.",
        ),
        ("i'm good, thanks.", "i feel very well today."),
        ("I am glad to hear that.",),
        ("glad",),
        0.6,
    ),
    _simple(
        "thanks",
        (
            "thank you.",
            "thanks.",
            "thank you very much.",
            "thanks a lot.",
            "many thanks.",
            "that was helpful, thank you.",
            "great, thanks.",
        ),
        ("thank you so much.", "thanks for your help."),
        ("You are welcome!", "You are very welcome."),
        ("welcome",),
    ),
    _simple(
        "goodbye",
        (
            "goodbye.",
            "bye.",
            "bye bye.",
            "see you later.",
            "i have to go now, goodbye.",
            "see you tomorrow.",
            "good night.",
            "goodbye for now.",
        ),
        ("i am leaving, bye.", "talk to you later, goodbye."),
        ("Goodbye! Talk to you soon.", "Goodbye!"),
        ("goodbye",),
    ),
    _simple(
        "help",
        (
            "what can you do?",
            "help.",
            "help me.",
            "what can i ask you?",
            "can you help me?",
            "what do you know?",
            "how can you help me?",
            "i need help.",
        ),
        ("what are you able to do?", "what kind of things can i ask?"),
        ("I can do sums, tell you about countries and animals, count, tell stories, and repeat words.",),
        ("sums",),
    ),
    _simple(
        "are_you_human",
        (
            "are you human?",
            "are you a person?",
            "are you a robot?",
            "are you a machine?",
            "are you real?",
            "are you a computer?",
            "am i talking to a machine?",
        ),
        ("are you a human being?", "am i talking to a person?"),
        ("I am a computer program that talks.",),
        ("computer program",),
        0.7,
    ),
    _simple(
        "praise",
        (
            "you are very good.",
            "well done.",
            "good job.",
            "that is right.",
            "you are smart.",
            "very good.",
            "i like you.",
        ),
        ("you did very well.", "nice job."),
        ("Thank you, that is kind of you.",),
        ("thank you",),
        0.5,
    ),
    _simple(
        "apology",
        (
            "i am sorry.",
            "sorry.",
            "i'm so sorry.",
            "excuse me.",
            "pardon me.",
            "please forgive me.",
        ),
        ("sorry about that.", "i apologize."),
        ("That is all right.", "No problem at all."),
        ("all right", "no problem"),
        0.5,
    ),
)


def _outside(rng: Random) -> Item:
    # No key: each phrasing uses some of the slots only, so no pair could be told from another; phrasings are held out.
    thing, other = rng.choice(NOUNS), rng.choice(NOUNS)
    name, second = rng.choice(FIRST_NAMES), rng.choice(FIRST_NAMES)
    return Item("", {"thing": thing, "other": other, "name": name, "second": second})


OUTSIDE_INTENTS: tuple[Intent, ...] = (
    Intent(
        "unknown",
        4.0,
        _outside,
        (
            "who invented the {thing}?",
            "how much does a {thing} cost?",
            "where can i buy a {thing}?",
            "how do i repair my {thing}?",
            "what do you think about the {thing}?",
            "when was the first {thing} made?",
            "why is the {thing} in the {other}?",
            "who is {name} from the {thing}?",
            "what will the weather be in the {thing}?",
            "did {name} call {second} about the {thing}?",
            "book a {thing} for {name}.",
            "how far is it to the {thing}?",
            "how old is {name}?",
            "send a {thing} to {name}.",
            "play some music about a {thing}.",
        ),
        (
            "what is a {thing} made of?",
            "order a {thing} for me.",
            "does {name} like the {other}?",
            "how many people have a {thing}?",
        ),
        ("Sorry, I do not know that.", "Sorry, I can not help with that."),
        answers=("sorry",),
    ),
    Intent(
        "fragment",
        1.0,
        _outside,
        (
            "what is the capital of {thing}?",
            "{thing} and {other}.",
            "the {thing}.",
            "the {thing} is, um, in the.",
            "i was in the {thing} with {name}.",
            "{name}, the {thing}, the {other}.",
        ),
        ("my {thing} is near the {other}.", "{thing}, {other}."),
        ("Sorry, I did not understand you.", "Sorry, can you say that again?"),
        answers=("sorry",),
    ),
)

SOUND_REPLIES = ("Sorry, I did not hear you.", "Sorry, I could not understand that.")
