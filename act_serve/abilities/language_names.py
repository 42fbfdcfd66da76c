"""What languages are called in English, in themselves, and in French, German and Spanish prompts."""

from __future__ import annotations

import difflib

_NAMES = {
    "ar": "arabic arabe arabisch árabe",
    "bg": "bulgarian bulgare bulgarisch búlgaro",
    "ca": "catalan català catalán katalanisch",
    "cs": "czech čeština tchèque tschechisch tschechische checo",
    "da": "danish dansk danois dänisch dänische danés",
    "de": "german deutsch deutsche deutsches allemand alemán aleman tedesco alemão duits",
    "el": "greek grec griechisch griechische griego",
    "en": "english anglais englisch englische englischen inglés ingles inglese inglês engels",
    "es": "spanish español espanol castellano espagnol spanisch spanische spagnolo espanhol spaans castilian",
    "fa": "persian farsi persan persisch persa",
    "fi": "finnish suomi finnois finnisch finnische finés finlandés",
    "fr": "french français francais französisch französische franzoesisch francés frances francese francês frans",
    "ga": "irish gaelic irlandais irisch irlandés",
    "he": "hebrew hébreu hebräisch hebräische hebreo",
    "hi": "hindi",
    "hr": "croatian croate kroatisch croata",
    "hu": "hungarian magyar hongrois ungarisch ungarische húngaro",
    "id": "indonesian indonésien indonesisch indonesio",
    "it": "italian italiano italien italienisch italienische italiaans",
    "ja": "japanese japonais japanisch japanische japonés japones",
    "ko": "korean coréen koreanisch koreanische coreano",
    "la": "latin latein lateinische latín",
    "nl": "dutch nederlands néerlandais niederländisch niederländische holländisch neerlandés holandés",
    "no": "norwegian norsk norvégien norwegisch norwegische noruego",
    "pl": "polish polski polonais polnisch polnische polaco",
    "pt": "portuguese português portugais portugiesisch portugiesische portugués portugues",
    "ro": "romanian roumain rumänisch rumänische rumano",
    "ru": "russian russe russisch russische ruso",
    "sv": "swedish svenska suédois schwedisch schwedische sueco",
    "th": "thai thaï thailändisch tailandés",
    "tr": "turkish türkçe turc türkisch türkische turco",
    "uk": "ukrainian ukrainien ukrainisch ukrainische ucraniano",
    "ur": "urdu ourdou",
    "vi": "vietnamese vietnamien vietnamesisch vietnamita",
    "zh": "chinese mandarin cantonese chinois chinesisch chinesische chino",
}
TAGS = {name: tag for tag, names in _NAMES.items() for name in names.split()}
_LONG = [name for name in TAGS if len(name) >= 6]


def called(word: str) -> str | None:
    """The ISO 639 code of the language that the lower-case ``word`` names, or None."""
    return TAGS.get(word)


def meant(word: str) -> str | None:
    """Like :func:`called`, and forgives a slip or two in a longer name; for places where only a name can stand."""
    if len(word) < 5:
        return TAGS.get(word)
    near = difflib.get_close_matches(word, _LONG, n=1, cutoff=0.8)
    return TAGS.get(word) or (TAGS[near[0]] if near else None)
