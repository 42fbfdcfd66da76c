"""Hundreds of names, cities and goods for synthetic order notes, split so that no test word is ever trained on."""

from functools import lru_cache
from itertools import product

from act_serve.pipeline.datasets.splits import Split, split_of


def words(text: str) -> tuple[str, ...]:
    """The words of a text, for a long list that reads well."""
    return tuple(text.split())


FIRST_NAMES = words(
    """
    Aaron Abigail Adele Ahmed Aisha Alan Albert Alice Amara Amelia Anders Andrea Anita Anton Arjun Astrid
    Barbara Beatrice Ben Bianca Boris Bridget Bruno Camille Carla Carlos Cecilia Chen Chloe Clara Claude Colin
    Cora Daniel Daphne Dario David Deepa Diana Diego Dina Dominic Doris Edgar Edith Elena Elias Ella Emil Emma
    Eric Esther Eva Fatima Felix Fiona Florence Frank Freya Gabriel Gemma George Gerda Gloria Grace Greta Gustav
    Hana Hannah Harold Hassan Hector Helen Henry Hugo Ibrahim Ida Igor Ines Ingrid Irene Isaac Ivan Jack Jada
    James Jana Jasper Joan Joel Jonas Julia Karim Karl Kate Keiko Kenji Lara Laura Leila Leo Liam Lina Louis
    Lucia Luke Lydia Magda Malik Marco Maria Marta Martin Maya Mei Mila Miriam Mohamed Mona Nadia Naomi Nathan
    Nico Nina Noah Nora Olga Oliver Omar Oscar Pablo Paula Pedro Petra Philip Priya Quentin Rachel Rafael Ravi
    Rita Robert Rosa Ruth Samir Sandra Sara Selma Simon Sofia Stefan Stella Sven Tamara Tariq Theo Thomas Tina
    Tobias Uma Ursula Vera Victor Viola Walter Wanda William Xavier Yara Yusuf Yvonne Zara Zoe
    """
)
SURNAME_STARTS = words(
    """
    Ash Bar Beck Black Brad Bran Brook Cald Carl Clif Cran Dal Dun East Ed El Fair Far Gar Glen Gold Grim Hal
    Har Hart Hay Hol Kirk Lang Led Lin Lock Mar Mer Mil Nor Oak Pem Pres Rad Red Rock Row Sel Shel Stan Stock
    Thorn Under Wal War Wel West Whit Win Wood Wyn
    """
)
SURNAME_ENDS = words(
    """
    berg bourne bridge by dale den ell ers field ford ham ings land ley low man mer more ridge sen ston ton wald
    ward way well wick win wood worth
    """
)
CITY_STARTS = words(
    """
    Alder Amber Apple Ash Bay Bel Birch Bright Bristle Cedar Clear Copper Coral Crest Deer Dover Eagle Elm Ever
    Falcon Fern Fox Frost Glen Grand Green Hazel High Iron Juniper King Lake Lark Linden Long Maple Marble Mill
    Moss New North Oak Old Otter Pine Queen Raven River Rose Salt Sand Silver South Spring Stone Summer Swan
    Thistle Timber Upper Vine Walnut West Willow Winter Wolf
    """
)
CITY_ENDS = words(
    """
    borough bridge brook burg bury cliff cross dale ford gate grove hampton haven hill holm hurst mere minster
    mouth point port shire stead ton vale view ville water wick wood
    """
)
REAL_CITIES = words(
    """
    Aberdeen Accra Adelaide Amsterdam Antwerp Athens Austin Bangkok Barcelona Basel Belfast Bergen Berlin Bilbao
    Bogota Boston Brisbane Brussels Bucharest Budapest Cairo Calgary Cardiff Chicago Cologne Copenhagen Cork
    Dakar Dallas Delhi Denver Detroit Dresden Dublin Durban Edinburgh Florence Frankfurt Geneva Genoa Ghent
    Glasgow Graz Hamburg Hanoi Helsinki Houston Istanbul Jakarta Kyoto Lagos Leeds Leipzig Lima Lisbon Liverpool
    London Lyon Madrid Malmo Manchester Manila Marseille Melbourne Miami Milan Montreal Mumbai Munich Nairobi
    Nantes Naples Osaka Oslo Ottawa Oxford Palermo Paris Perth Phoenix Porto Prague Quito Reykjavik Riga Rome
    Rotterdam Salzburg Santiago Seattle Seoul Seville Singapore Sofia Stockholm Stuttgart Sydney Tallinn Tampere
    Tokyo Toronto Toulouse Turin Utrecht Valencia Vancouver Venice Vienna Vilnius Warsaw Wellington York Zagreb
    Zurich
    """
)
MATERIALS = words(
    """
    aluminium antique bamboo black blue brass ceramic copper cordless cotton curved digital electric folding
    glass gold green grey heavy insulated iron large leather linen magnetic marble metal mini nylon oak orange
    paper pine plastic polished portable purple red round rubber silk silver slim small square stainless steel
    striped thick thin tinted velvet vintage waterproof white wireless wooden woollen yellow
    """
)
GOODS = words(
    """
    adapters alarms anchors aprons armchairs awnings axes backpacks badges balloons bandages banners barrels
    baskets batteries beakers beams belts benches bicycles binders blankets blinds bolts books bookends bottles
    bowls boxes bracelets brackets bricks brooms brushes buckets buckles bulbs buttons cabinets cables
    calculators calendars cameras candles canopies canvases caps carpets cartons chains chairs chisels clamps
    clips clocks coats coils combs compasses cones containers cookers coolers cords couches crates cups curtains
    cushions cutters cylinders desks dials diaries dishes doorbells doors drawers drills drums easels envelopes
    erasers fans faucets fences filters flags flasks flutes folders forks frames freezers funnels furnaces
    gaskets gates gauges gears generators gloves goggles grills guitars hammers hammocks handles hangers
    harnesses hats headphones heaters helmets hinges hooks hoses jackets jars jugs kettles keyboards keys kites
    knives knobs labels ladders lamps lanterns latches lenses levers lids lighters locks looms magnets mallets
    maps masks mats mattresses medals microphones mirrors mittens mixers monitors mops motors mousepads mugs
    nails napkins necklaces needles nets notebooks nozzles oars ovens padlocks pads paintings pans parasols
    pedals pegs pencils pendants pens pianos pillows pins pipes pistons pitchers plates platters pliers plugs
    poles posters pots printers projectors pulleys pumps puzzles racks radios railings rakes razors reels
    ribbons rings rods rollers ropes rugs rulers saddles sandals saucers saws scales scanners scarves scissors
    screens screws sensors shelves shields shirts shoes shovels shutters sieves signs sinks sirens skates
    skewers sleds slippers soaps socks sofas spades speakers spools spoons sprayers springs stamps staplers
    statues stools stoves straps suitcases switches syringes tables tablets tags tanks tapes tarps telescopes
    tents thermometers thimbles tiles timers tins tires toasters tongs toolboxes torches towels toys tractors
    trays tripods trolleys trophies trumpets tubes turbines umbrellas urns valves vases vests violins wagons
    wallets washers watches webcams wheels whistles windows wires wrenches zippers
    """
)


@lru_cache
def buyers(split: Split) -> list[str]:
    """Full names whose first name and surname both belong to `split`."""
    return [f"{first} {last}" for first, last in product(_part(FIRST_NAMES, split), _surnames(split))]


@lru_cache
def _surnames(split: Split) -> list[str]:
    whole = tuple(start + end for start, end in product(SURNAME_STARTS, SURNAME_ENDS))
    return _part(whole, split)


@lru_cache
def cities(split: Split) -> list[str]:
    """Cities, real and made up, of `split`."""
    made = tuple(start + end for start, end in product(CITY_STARTS, CITY_ENDS))
    return _part((*REAL_CITIES, *made), split)


@lru_cache
def items(split: Split) -> list[str]:
    """Goods of `split`, alone and with an adjective or two; the noun itself is unknown to the other splits."""
    nouns = _part(GOODS, split)
    single = [f"{adjective} {noun}" for adjective, noun in product(MATERIALS, nouns)]
    return [*nouns * 20, *single]


@lru_cache
def first_names(split: Split) -> list[str]:
    """First names of `split`."""
    return _part(FIRST_NAMES, split)


@lru_cache
def goods(split: Split) -> list[str]:
    """Nouns of `split`, without adjectives."""
    return _part(GOODS, split)


def _part(words: tuple[str, ...], split: Split) -> list[str]:
    return [word for word in words if split_of(word.lower()) == split]
