"""The kinds of word problems, each in English and in French with its steps."""

from collections.abc import Mapping
from dataclasses import dataclass

from act_serve.pipeline.datasets.lexicon import words

SMALL, MEDIUM, LARGE = (2, 12), (5, 40), (20, 99)


@dataclass(frozen=True, slots=True)
class Problem:
    """One kind: texts with places for `numbers`, each drawn from a range, and the `steps` that solve it."""

    en: str
    fr: str
    numbers: Mapping[str, tuple[int, int]]
    steps: tuple[str, ...]


PROBLEMS = (
    Problem(
        "{name} buys {a} boxes of {b} {goods} each and finds {c} more {goods} at home. How many {goods} are there?",
        "{name} achète {a} boîtes de {b} {goods} chacune et trouve {c} {goods} de plus à la maison. "
        "Combien de {goods} y a-t-il ?",
        {"a": SMALL, "b": SMALL, "c": MEDIUM},
        ("a*b", "_+c"),
    ),
    Problem(
        "{name} has {a} {goods}. {name} sells {b} of them and then buys {c} new ones. How many {goods} are left?",
        "{name} a {a} {goods}. {name} en vend {b}, puis en achète {c} autres. Combien de {goods} reste-t-il ?",
        {"a": LARGE, "b": MEDIUM, "c": MEDIUM},
        ("a-b", "_+c"),
    ),
    Problem(
        "{name} buys {a} {goods} at {b} euros each and {c} {second} at {d} euros each. How many euros does it cost?",
        "{name} achète {a} {goods} à {b} euros pièce et {c} {second} à {d} euros pièce. "
        "Combien d'euros cela coûte-t-il ?",
        {"a": SMALL, "b": SMALL, "c": SMALL, "d": SMALL},
        ("a*b", "c*d", "r1+r2"),
    ),
    Problem(
        "{name} has {a} euros and buys {b} {goods} at {c} euros each. How many euros remain?",
        "{name} a {a} euros et achète {b} {goods} à {c} euros pièce. Combien d'euros reste-t-il ?",
        {"a": (40, 200), "b": SMALL, "c": SMALL},
        ("b*c", "a-_"),
    ),
    Problem(
        "{a} {goods} are packed into boxes of {b}. Then {name} uses {c} boxes. How many full boxes are left?",
        "On range {a} {goods} dans des boîtes de {b}. Ensuite, {name} utilise {c} boîtes. "
        "Combien de boîtes pleines reste-t-il ?",
        {"a": (20, 144), "b": SMALL, "c": (1, 6)},
        ("a/b", "_-c"),
    ),
    Problem(
        "{name} works {a} hours a day for {b} days and then {c} more hours. How many hours is that?",
        "{name} travaille {a} heures par jour pendant {b} jours, puis encore {c} heures. "
        "Combien d'heures cela fait-il ?",
        {"a": (2, 9), "b": SMALL, "c": SMALL},
        ("a*b", "_+c"),
    ),
    Problem(
        "A film lasts {a} hours and {b} minutes. How many minutes is that?",
        "Un film dure {a} heures et {b} minutes. Combien de minutes cela fait-il ?",
        {"a": (2, 9), "b": (3, 57)},
        ("a*60", "_+b"),
    ),
    Problem(
        "A holiday lasts {a} weeks and {b} days. {name} has already used {c} days. How many days are left?",
        "Des vacances durent {a} semaines et {b} jours. {name} a déjà pris {c} jours. Combien de jours reste-t-il ?",
        {"a": SMALL, "b": (1, 6), "c": SMALL},
        ("a*7", "_+b", "_-c"),
    ),
    Problem(
        "A rope is {a} metres long. {name} cuts off {b} pieces of {c} metres each. How many metres remain?",
        "Une corde mesure {a} mètres. {name} en coupe {b} morceaux de {c} mètres chacun. "
        "Combien de mètres reste-t-il ?",
        {"a": (30, 150), "b": SMALL, "c": (2, 9)},
        ("b*c", "a-_"),
    ),
    Problem(
        "{name} has {a} {goods} and {other} has {b} times as many. How many {goods} do they have together?",
        "{name} a {a} {goods} et {other} en a {b} fois plus. Combien de {goods} ont-ils ensemble ?",
        {"a": MEDIUM, "b": (2, 6)},
        ("a*b", "a+_"),
    ),
    Problem(
        "{name} and {other} share {a} {goods} equally, and then {name} gives away {b}. "
        "How many {goods} has {name} now?",
        "{name} et {other} se partagent {a} {goods} à parts égales, puis {name} en donne {b}. "
        "Combien de {goods} {name} a-t-il maintenant ?",
        {"a": LARGE, "b": SMALL},
        ("a/2", "_-b"),
    ),
    Problem(
        "A bus has {a} passengers. At one stop {b} get off and {c} get on, at the next {d} get off. How many are left?",
        "Un bus transporte {a} passagers. À un arrêt, {b} descendent et {c} montent, au suivant {d} descendent. "
        "Combien en reste-t-il ?",
        {"a": LARGE, "b": SMALL, "c": SMALL, "d": SMALL},
        ("a-b", "_+c", "_-d"),
    ),
    Problem(
        "It is day {a} of the month. {name} leaves in {b} days and returns {c} days later. "
        "Which day of the month is the return?",
        "Nous sommes le jour {a} du mois. {name} part dans {b} jours et revient {c} jours plus tard. "
        "Quel jour du mois est le retour ?",
        {"a": (1, 9), "b": (2, 9), "c": (2, 10)},
        ("a+b", "_+c"),
    ),
    Problem(
        "A tank holds {a} litres. {name} fills {b} cans of {c} litres and {d} litres are spilt. "
        "How many litres remain in the tank?",
        "Un réservoir contient {a} litres. {name} remplit {b} bidons de {c} litres et {d} litres sont perdus. "
        "Combien de litres reste-t-il dans le réservoir ?",
        {"a": (60, 200), "b": SMALL, "c": (2, 9), "d": SMALL},
        ("b*c", "a-_", "_-d"),
    ),
    Problem(
        "{name} drives {a} kilometres an hour for {b} hours and then walks {c} kilometres. "
        "How many kilometres is that?",
        "{name} roule à {a} kilomètres à l'heure pendant {b} heures, puis marche {c} kilomètres. "
        "Combien de kilomètres cela fait-il ?",
        {"a": (20, 90), "b": (2, 6), "c": SMALL},
        ("a*b", "_+c"),
    ),
    Problem(
        "There are {a} rows of {b} chairs in a hall. {c} chairs are broken. How many chairs can be used?",
        "Dans une salle, il y a {a} rangées de {b} chaises. {c} chaises sont cassées. "
        "Combien de chaises peut-on utiliser ?",
        {"a": SMALL, "b": SMALL, "c": SMALL},
        ("a*b", "_-c"),
    ),
    Problem(
        "{name} saves {a} euros a week for {b} weeks and spends {c} euros. How many euros are left?",
        "{name} économise {a} euros par semaine pendant {b} semaines et dépense {c} euros. "
        "Combien d'euros reste-t-il ?",
        {"a": MEDIUM, "b": SMALL, "c": MEDIUM},
        ("a*b", "_-c"),
    ),
)
UNSEEN_PROBLEMS = (
    Problem(
        "{name} bakes {a} trays of {b} cakes and eats {c}. How many cakes are there now?",
        "{name} prépare {a} plaques de {b} gâteaux et en mange {c}. Combien de gâteaux y a-t-il maintenant ?",
        {"a": SMALL, "b": SMALL, "c": SMALL},
        ("a*b", "_-c"),
    ),
    Problem(
        "A book has {a} pages. {name} reads {b} pages a day for {c} days. How many pages are left to read?",
        "Un livre a {a} pages. {name} lit {b} pages par jour pendant {c} jours. Combien de pages reste-t-il à lire ?",
        {"a": (90, 300), "b": MEDIUM, "c": (2, 7)},
        ("b*c", "a-_"),
    ),
    Problem(
        "{name} is {a} years old and {other} is {b} years older. How many years old are they together?",
        "{name} a {a} ans et {other} a {b} ans de plus. Combien d'années ont-ils ensemble ?",
        {"a": MEDIUM, "b": SMALL},
        ("a+b", "a+_"),
    ),
    Problem(
        "A machine makes {a} {goods} a day. After {b} days {name} takes {c} of them. How many {goods} are left?",
        "Une machine fabrique {a} {goods} par jour. Après {b} jours, {name} en prend {c}. "
        "Combien de {goods} reste-t-il ?",
        {"a": MEDIUM, "b": (2, 9), "c": MEDIUM},
        ("a*b", "_-c"),
    ),
)
# All begin with a consonant, so that "combien de" needs no elision.
FRENCH_GOODS = words(
    """
    bagues balais balles ballons bancs bandages barils bassines batteries bidons billes biscuits blouses bobines
    bocaux bottes bougies bouteilles boutons bracelets briques brosses bureaux cadenas cadres cahiers caisses
    calendriers canapés carafes cartes cartons casques casseroles ceintures cerises chaises chandelles chapeaux
    chaussettes chaussures chemises ciseaux citrons clous colliers compas coussins couteaux couvertures crayons
    cravates cuillères cylindres disques dossiers draps fauteuils fenêtres feuilles ficelles filtres flacons
    flûtes fourchettes gants gilets gobelets gommes guitares jouets jupes kiwis lampes lanternes livres loupes
    lunettes manteaux marteaux masques matelas melons micros miroirs montres moteurs mouchoirs nappes niveaux
    paniers pantalons parapluies peignes pelles perles perceuses pinceaux pinces pipes planches plantes plaques
    plateaux poches poires pommes portes pots poupées poutres prunes pulls pupitres puzzles radios rames rasoirs
    rideaux robes robinets roues rouleaux rubans sabres sacs savons selles serviettes seaux sifflets stylos
    tables tablettes tabourets tambours tapis tasses timbres tiroirs tomates torches tournevis trompettes tuiles
    tuyaux valises vases verres vestes violons vis vitres voiles voitures
    """
)
