"""The words of the built-in tasks and of the unlabelled prose about them."""

from __future__ import annotations

PEOPLE = "Anna Tom Maria Peter Lucy Omar Nina Carl Ivy Hugo".split()
PEOPLE += "Lena Boris Clara Felix Rosa Simon Vera Max Edith Paul".split()
COLOURS = "red blue green black white yellow brown grey".split()
PLACES = "Paris Rome Oslo Cairo Lima Delhi Tokyo Dublin Boston Madrid Vienna Prague".split()
THINGS = "car coat lamp chair table piano bike boat clock phone camera guitar hat bag ring sofa".split()
#: What people do with things, and its opposite.
DEALS = {"bought": "sold", "found": "lost", "painted": "cleaned"}
DEALS |= {opposite: deed for deed, opposite in DEALS.items()}
#: The infinitives, which questions with "did" have.
INFINITIVES = {"bought": "buy", "sold": "sell", "found": "find", "lost": "lose", "painted": "paint", "cleaned": "clean"}
TIMES = ("on Monday", "last week", "in May", "yesterday", "at noon", "on Friday", "in July", "last year")

GOOD = "great lovely superb delightful brilliant charming excellent wonderful pleasant splendid".split()
BAD = "awful dull terrible boring dreadful poor horrible tedious weak nasty".split()
REVIEWED = "film play book song meal hotel show story concert speech dinner garden".split()
DEGREES = ("", "really ", "quite ", "very ", "truly ", "rather ")
STARTS = ("the {r} was", "a {r} that was", "{p} said the {r} was", "this {r} is", "{p} found that the {r} was")

#: For each topic who does what to what.
TOPICS = {
    "sport": (
        "team player coach runner goalkeeper champion striker referee".split(),
        "won lost missed watched celebrated filmed".split(),
        "match goal race medal final season league penalty".split(),
    ),
    "food": (
        "cook baker chef waiter farmer butcher guest grocer".split(),
        "boiled served roasted tasted ordered peeled".split(),
        "soup bread rice cheese pasta salad onion stew".split(),
    ),
    "music": (
        "singer drummer pianist band choir violinist composer conductor".split(),
        "played sang rehearsed recorded performed composed".split(),
        "song opera waltz concerto melody symphony ballad tune".split(),
    ),
    "weather": (
        "storm wind rain frost cloud snow fog thunder".split(),
        "covered reached hit crossed darkened flooded".split(),
        "valley coast hills river shore mountains island bay".split(),
    ),
}

SINGULAR = "dog cat boy girl teacher nurse farmer sailor bird horse".split()
VERBS = "sleep walk sing swim jump work wait dance read shout".split()
AGES = ("", "", "old ", "young ", "small ", "tired ")
WHERE: tuple[str, ...] = ("near the lake", "in the park", "at home", "by the river", "in the yard", "at school")
WHERE += ("on the hill", "near the gate")


def third_person(verb: str) -> str:
    """Return the form of a verb that goes with a singular subject."""
    return verb + ("es" if verb.endswith("ch") else "s")
