"""Lists countries and what the demo asks about them, written from general knowledge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Relation = Literal["capital", "continent", "language"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)


@dataclass(frozen=True)
class Country:
    """One country.

    Attributes:
        name: as it is said, with its article where it has one ("the Netherlands").
        capital: capital city.
        continent: continent it mostly lies in.
        language: main official language.
    """

    name: str
    capital: str
    continent: str
    language: str

    def answer(self, relation: Relation) -> str:
        """The value of a relation."""
        return str(getattr(self, relation))


_TABLE = """
Afghanistan | Kabul | Asia | Pashto
Albania | Tirana | Europe | Albanian
Argentina | Buenos Aires | South America | Spanish
Armenia | Yerevan | Asia | Armenian
Australia | Canberra | Oceania | English
Austria | Vienna | Europe | German
Azerbaijan | Baku | Asia | Azerbaijani
Bangladesh | Dhaka | Asia | Bengali
Belarus | Minsk | Europe | Belarusian
Belgium | Brussels | Europe | Dutch
Brazil | Brasilia | South America | Portuguese
Bulgaria | Sofia | Europe | Bulgarian
Cambodia | Phnom Penh | Asia | Khmer
Cameroon | Yaounde | Africa | French
Canada | Ottawa | North America | English
Chile | Santiago | South America | Spanish
China | Beijing | Asia | Mandarin
Colombia | Bogota | South America | Spanish
Costa Rica | San Jose | North America | Spanish
Croatia | Zagreb | Europe | Croatian
Cuba | Havana | North America | Spanish
Cyprus | Nicosia | Europe | Greek
Denmark | Copenhagen | Europe | Danish
Egypt | Cairo | Africa | Arabic
Estonia | Tallinn | Europe | Estonian
Ethiopia | Addis Ababa | Africa | Amharic
Finland | Helsinki | Europe | Finnish
France | Paris | Europe | French
Germany | Berlin | Europe | German
Ghana | Accra | Africa | English
Greece | Athens | Europe | Greek
Guatemala | Guatemala City | North America | Spanish
Haiti | Port-au-Prince | North America | French
Hungary | Budapest | Europe | Hungarian
Iceland | Reykjavik | Europe | Icelandic
India | New Delhi | Asia | Hindi
Indonesia | Jakarta | Asia | Indonesian
Iran | Tehran | Asia | Persian
Iraq | Baghdad | Asia | Arabic
Ireland | Dublin | Europe | English
Italy | Rome | Europe | Italian
Japan | Tokyo | Asia | Japanese
Kenya | Nairobi | Africa | Swahili
Latvia | Riga | Europe | Latvian
Libya | Tripoli | Africa | Arabic
Lithuania | Vilnius | Europe | Lithuanian
Luxembourg | Luxembourg City | Europe | French
Malaysia | Kuala Lumpur | Asia | Malay
Mexico | Mexico City | North America | Spanish
Mongolia | Ulaanbaatar | Asia | Mongolian
Morocco | Rabat | Africa | Arabic
Nepal | Kathmandu | Asia | Nepali
the Netherlands | Amsterdam | Europe | Dutch
New Zealand | Wellington | Oceania | English
Nicaragua | Managua | North America | Spanish
Nigeria | Abuja | Africa | English
Norway | Oslo | Europe | Norwegian
Pakistan | Islamabad | Asia | Urdu
Paraguay | Asuncion | South America | Spanish
Peru | Lima | South America | Spanish
the Philippines | Manila | Asia | Filipino
Poland | Warsaw | Europe | Polish
Portugal | Lisbon | Europe | Portuguese
Qatar | Doha | Asia | Arabic
Romania | Bucharest | Europe | Romanian
Russia | Moscow | Europe | Russian
Saudi Arabia | Riyadh | Asia | Arabic
Senegal | Dakar | Africa | French
Serbia | Belgrade | Europe | Serbian
Singapore | Singapore | Asia | English
Slovakia | Bratislava | Europe | Slovak
Slovenia | Ljubljana | Europe | Slovene
Somalia | Mogadishu | Africa | Somali
South Korea | Seoul | Asia | Korean
Spain | Madrid | Europe | Spanish
Sudan | Khartoum | Africa | Arabic
Sweden | Stockholm | Europe | Swedish
Switzerland | Bern | Europe | German
Syria | Damascus | Asia | Arabic
Tanzania | Dodoma | Africa | Swahili
Thailand | Bangkok | Asia | Thai
Tunisia | Tunis | Africa | Arabic
Turkey | Ankara | Asia | Turkish
Uganda | Kampala | Africa | English
Ukraine | Kyiv | Europe | Ukrainian
the United Kingdom | London | Europe | English
the United States | Washington | North America | English
Uruguay | Montevideo | South America | Spanish
Venezuela | Caracas | South America | Spanish
Vietnam | Hanoi | Asia | Vietnamese
Yemen | Sana'a | Asia | Arabic
Zimbabwe | Harare | Africa | English
"""

COUNTRIES: tuple[Country, ...] = tuple(
    Country(*(cell.strip() for cell in line.split("|"))) for line in _TABLE.strip().splitlines()
)
"""Every country, in alphabetical order."""

OTHER_SPELLINGS: dict[str, tuple[str, ...]] = {
    "Kyiv": ("Kiev",),
    "Washington": ("Washington, D.C.",),
    "Mandarin": ("Chinese",),
    "Persian": ("Farsi",),
    "Slovene": ("Slovenian",),
    "Filipino": ("Tagalog",),
    "Indonesian": ("Bahasa Indonesia",),
    "Ulaanbaatar": ("Ulan Bator",),
    "Yaounde": ("Yaoundé",),
    "Bogota": ("Bogotá",),
    "Brasilia": ("Brasília",),
    "Asuncion": ("Asunción",),
    "San Jose": ("San José",),
    "Sana'a": ("Sanaa",),
    "Pashto": ("Dari",),
}
"""Answers that are right as well, by the answer of the table."""


def accepted(country: Country, relation: Relation) -> list[str]:
    """Every answer that counts as right, the canonical one first."""
    answer = country.answer(relation)
    return [answer, *OTHER_SPELLINGS.get(answer, ())]
