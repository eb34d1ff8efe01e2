"""Two short pages in the form of WikiText."""

from __future__ import annotations

# A line of WikiText is between spaces, and a blank one is a space.
LINES = [
    "",
    "= Old Mill Road =",
    "",
    'Old Mill Road ( also the " Mill Way " ) is a 12 @.@ 5 @-@ mile lane in the north , built in',
    "1893 for 1 @,@ 200 crowns . The town 's council , led by J. H. Adams , widened it ; it",
    "wasn 't closed : the players ' wagons went on . It is 40 ° C there in summer !",
    "",
    "= = History = =",
    "",
    'The lane [ sic ] had " no name " until 1901 . Who paid $ 30 ? The U.S. Army did , 5 % .',
    "= = = Later years = = =",
    "",
    "A naïve façade – it stands .",
    "",
    "= Second page =",
    "",
    "Its one line is here ...",
]
PAGES = "".join(f" {line} \n" if line else " \n" for line in LINES)


def rows_of(text: str) -> list[str]:
    """What the data set's script makes of a file: its lines with their ends, "" for blank ones."""
    return [line if line.strip() else "" for line in text.splitlines(keepends=True)]
