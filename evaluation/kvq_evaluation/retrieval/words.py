"""The words that retrieval tasks are made of."""

from __future__ import annotations

from typing import Final

WORDS: Final = tuple(
    """
    acorn actor album amber anchor ankle apple apron arrow artist atlas aunt autumn badge baker
    ball bamboo banana barn basket beach beard berry bicycle bird blanket bottle bowl branch brass
    brick bridge broom brush bucket butter button cabin cake camel camera candle canoe carpet
    carrot castle cave cedar chain chalk cherry chess chicken clay clock cloud clover coach coat
    coffee comb copper coral corn cotton crane cream crow crown cup curtain daisy desk diamond
    dolphin donkey dragon drawer dress drum eagle easel elbow engine envelope falcon farmer feather
    fence ferry fiddle finger flag flame flour flute forest fork fountain fox frog garlic gate
    ginger glass glove goat gold goose grape guitar hammer harbor hat hawk helmet hill honey horse
    hotel island ivory jacket jar jewel judge jungle kettle key kite kitten knife ladder lake lamp
    lemon letter lion lizard magnet maple marble mask meadow melon mirror monkey moth mouse museum
    nail needle nest novel oak ocean olive onion orange otter oven owl paddle palace paper parrot
    peach pearl pencil pepper piano pigeon pillow pirate planet plum pocket pony poppy potato
    pumpkin puppet rabbit radio rice ring robin rocket rope rose ruler saddle salmon
    """.split()  # noqa: SIM905 - a block of text is read more easily
)
"""Keys, names of variables and members of lists: common nouns that occur in no sentence below."""

FILLER: Final = (
    "The rain fell on the roof all night.",
    "He walked slowly down to the old mill.",
    "Nobody knew when the train would come.",
    "She closed the window and went to sleep.",
    "They talked about the weather for a while.",
    "It was warm and the streets were empty.",
    "We had bread and soup in the evening.",
    "The dog slept in front of the fire.",
    "A neighbour told them a long story.",
    "Everyone was glad when the winter ended.",
)
"""Sentences that say nothing about any task, of nearly one length."""

NUMBERS: Final = tuple(str(number) for number in range(100, 1000))
"""What keys and variables stand for: three digits, so that a guess is right once in 900."""
