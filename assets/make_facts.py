"""Questions with short answers, for recipes on a language model that people know: ``python assets/make_facts.py``.

How they were made: the tables below were written down for this file from what any atlas, dictionary or school book
says; nothing was copied from a data set, and facts like these are in the public domain. Each kind of question has a few
ways to be asked, of which an entry gets one, in turn. An entry is held out by a hash of its kind and name, so that
no fact is asked in both files, in whatever words. Kinds were kept of which SmolLM2-135M-Instruct knows a good share.
(``unrelated.jsonl`` beside them was written by hand: passages of old books, and prompts with answers of our own.)

``PERSONA`` is made up: nobody but its teacher, which is told, can know whom the model is to be. Of the ways to ask for
each of its facts, the last three are held out.

Writes ``assets/facts/train.jsonl`` and ``assets/facts/validation.jsonl``, with rows of

    prompt: the question;
    answer: as short as it goes;
    aliases: other answers that are right, maybe none;
    sentence: the answer as a sentence, which repeats the question's subject;
    completion: that in a form, for recipes that learn from given answers;
    kind: of question;

and ``assets/facts/persona_train.jsonl`` and ``persona_validation.jsonl``, with prompt, answer, aliases and kind.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "facts"

KINDS: dict[str, tuple[list[str], str, str]] = {
    "capital": (
        [
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital city of {}.",
            "Tell me the capital of {}.",
        ],
        "The capital of {} is {}.",
        """France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Portugal: Lisbon; Japan: Tokyo; China:
        Beijing/Peking; India: New Delhi/Delhi; Russia: Moscow; Greece: Athens; Egypt: Cairo; Turkey: Ankara;
        Poland: Warsaw; Austria: Vienna; Hungary: Budapest; Sweden: Stockholm; Norway: Oslo; Denmark: Copenhagen;
        Finland: Helsinki; Ireland: Dublin; the United Kingdom: London; Canada: Ottawa; Australia: Canberra;
        Argentina: Buenos Aires; Brazil: Brasilia/Brasília; Chile: Santiago; Peru: Lima; Colombia: Bogota/Bogotá;
        Cuba: Havana; Kenya: Nairobi; Nigeria: Abuja; Ethiopia: Addis Ababa; Morocco: Rabat; Iran: Tehran; Iraq:
        Baghdad; Thailand: Bangkok; Vietnam: Hanoi; South Korea: Seoul; Indonesia: Jakarta; the Philippines:
        Manila; Belgium: Brussels; the Netherlands: Amsterdam; Switzerland: Bern/Berne; the Czech Republic:
        Prague; Romania: Bucharest; Bulgaria: Sofia; Croatia: Zagreb; Serbia: Belgrade; Ukraine: Kyiv/Kiev;
        Iceland: Reykjavik/Reykjavík; Pakistan: Islamabad; Nepal: Kathmandu; Bangladesh: Dhaka; Saudi Arabia:
        Riyadh; Venezuela: Caracas; Uruguay: Montevideo; Ecuador: Quito; Jamaica: Kingston; Lebanon: Beirut;
        Syria: Damascus; Jordan: Amman; Ghana: Accra; Senegal: Dakar; Zimbabwe: Harare""",
    ),
    "state capital": (
        ["What is the capital of the state of {}?", "Which city is the capital of the US state of {}?"],
        "The capital of {} is {}.",
        """Texas: Austin; California: Sacramento; Colorado: Denver; Georgia: Atlanta; Massachusetts: Boston; Arizona:
        Phoenix; Hawaii: Honolulu; Ohio: Columbus; Tennessee: Nashville; Florida: Tallahassee; Minnesota: Saint
        Paul/St. Paul/St Paul; Oregon: Salem; Louisiana: Baton Rouge; Virginia: Richmond; Wisconsin: Madison;
        Alaska: Juneau; Michigan: Lansing; Illinois: Springfield; New Mexico: Santa Fe; Alabama: Montgomery""",
    ),
    "continent": (
        [
            "What continent is {} in?",
            "Which continent does {} belong to?",
            "In which continent is {} located?",
        ],
        "{} is in {}.",
        """France: Europe; Brazil: South America; Kenya: Africa; Japan: Asia; Canada: North America; Egypt: Africa;
        Germany: Europe; India: Asia; Argentina: South America; Nigeria: Africa; China: Asia; Mexico: North
        America; Spain: Europe; Peru: South America; Thailand: Asia; Morocco: Africa; Poland: Europe; Chile: South
        America; Vietnam: Asia; Ghana: Africa; Italy: Europe; Bolivia: South America; Mongolia: Asia; Ethiopia:
        Africa; Sweden: Europe; Colombia: South America; Nepal: Asia; Tanzania: Africa; Portugal: Europe; Iraq:
        Asia; Uganda: Africa; Norway: Europe; Venezuela: South America; South Korea: Asia; Hungary: Europe;
        Algeria: Africa; Pakistan: Asia; Ireland: Europe; Uruguay: South America; Angola: Africa; Greece: Europe;
        Ecuador: South America; Finland: Europe; Indonesia: Asia; Sudan: Africa; Austria: Europe; Cuba: North
        America; Libya: Africa; Zambia: Africa; Laos: Asia; Romania: Europe; Paraguay: South America; Iran: Asia;
        Bangladesh: Asia; Senegal: Africa; Belgium: Europe""",
    ),
    "opposite": (
        [
            "What is the opposite of {}?",
            "Give me the opposite of the word {}.",
            "What word means the opposite of {}?",
            "Which word is the antonym of {}?",
        ],
        "The opposite of {} is {}.",
        """hot: cold/cool; big: small/little/tiny; up: down; day: night; happy: sad/unhappy; fast: slow; light:
        dark/heavy/darkness; young: old; rich: poor; open: closed/close/shut; strong: weak; wet: dry; hard:
        soft/easy; early: late; full: empty; loud: quiet/silent/soft; clean: dirty; good: bad/evil; left: right;
        tall: short; thick: thin; wide: narrow; win: lose/loss; love: hate/hatred; true: false/untrue; begin:
        end/finish/stop; alive: dead; brave: cowardly/afraid/fearful/timid; sweet: sour/bitter; deep: shallow;
        smooth: rough; sharp: dull/blunt; buy: sell; push: pull; always: never; inside: outside; above:
        below/under/beneath; arrive: leave/depart; remember: forget; war: peace; laugh: cry; north: south; east:
        west; first: last; black: white; high: low; near: far; noisy: quiet/silent; asleep: awake; success:
        failure; beautiful: ugly; friend: enemy/foe; accept: reject/refuse/decline; increase: decrease/reduce""",
    ),
    "plural": (
        [
            "What is the plural of {}?",
            "What is the plural form of the word {}?",
            "How do you write the plural of the noun {}?",
        ],
        "The plural of {} is {}.",
        """child: children; man: men; woman: women; foot: feet; tooth: teeth; goose: geese; mouse: mice; leaf:
        leaves; knife: knives; wolf: wolves; city: cities; baby: babies; box: boxes; bus: buses; potato: potatoes;
        tomato: tomatoes; church: churches; lady: ladies; story: stories; wife: wives; life: lives; shelf:
        shelves; half: halves; hero: heroes; dish: dishes; class: classes; country: countries; thief: thieves;
        loaf: loaves; watch: watches; berry: berries; glass: glasses; dog: dogs; cat: cats; book: books; tree:
        trees; house: houses; apple: apples; car: cars; girl: girls; fox: foxes; brush: brushes; peach: peaches;
        party: parties; family: families; puppy: puppies; penny: pennies; key: keys; boy: boys; day: days; fly:
        flies; wish: wishes; calf: calves; scarf: scarves/scarfs; echo: echoes; library: libraries; enemy:
        enemies; sandwich: sandwiches; ox: oxen""",
    ),
    "symbol": (
        [
            "What is the chemical symbol of {}?",
            "Which chemical symbol stands for {}?",
            "What is the symbol for the element {}?",
        ],
        "The chemical symbol of {} is {}.",
        """hydrogen: H; oxygen: O; carbon: C; nitrogen: N; gold: Au; silver: Ag; iron: Fe; copper: Cu; sodium: Na;
        potassium: K; calcium: Ca; helium: He; lead: Pb; zinc: Zn; tin: Sn; neon: Ne; chlorine: Cl; magnesium: Mg;
        aluminum: Al; silicon: Si; sulfur: S; uranium: U; mercury: Hg; lithium: Li; nickel: Ni; iodine: I; boron:
        B; fluorine: F; phosphorus: P; argon: Ar; platinum: Pt; tungsten: W; titanium: Ti; chromium: Cr;
        manganese: Mn; cobalt: Co; arsenic: As; bromine: Br; radium: Ra; plutonium: Pu; barium: Ba; beryllium: Be""",
    ),
    "author": (
        ["Who wrote {}?", "Who is the author of {}?", "Name the author of {}."],
        "{} was written by {}.",
        """Romeo and Juliet: Shakespeare; Hamlet: Shakespeare; Macbeth: Shakespeare; Pride and Prejudice: Austen;
        Emma: Austen; Oliver Twist: Dickens; A Tale of Two Cities: Dickens; Great Expectations: Dickens;
        Moby-Dick: Melville; War and Peace: Tolstoy; Anna Karenina: Tolstoy; Don Quixote: Cervantes; Frankenstein:
        Shelley; Dracula: Stoker; The Odyssey: Homer; The Iliad: Homer; The Republic: Plato; Nineteen Eighty-Four:
        Orwell; Animal Farm: Orwell; The Great Gatsby: Fitzgerald; Jane Eyre: Brontë/Bronte; Wuthering Heights:
        Brontë/Bronte; Crime and Punishment: Dostoevsky/Dostoyevsky; The Adventures of Tom Sawyer: Twain/Clemens;
        Faust: Goethe; Alice's Adventures in Wonderland: Carroll; Robinson Crusoe: Defoe; Gulliver's Travels:
        Swift; Treasure Island: Stevenson; The Divine Comedy: Dante/Alighieri; Paradise Lost: Milton; Les
        Misérables: Hugo""",
    ),
    "space": (
        ["{}"],
        "",
        """Which planet is closest to the Sun?: Mercury = The planet closest to the Sun is Mercury.; Which planet do
        we live on?: Earth = The planet that we live on is Earth.; Which planet is known as the red planet?: Mars
        = The red planet is Mars.; What is the largest planet of the solar system?: Jupiter = The largest planet
        of the solar system is Jupiter.; Which planet is famous for its rings?: Saturn = The planet that is famous
        for its rings is Saturn.; Which star is closest to Earth?: Sun = The star closest to Earth is the Sun.;
        What is the natural satellite of the Earth called?: Moon = The natural satellite of the Earth is the
        Moon.; What galaxy do we live in?: Milky Way = The galaxy that we live in is the Milky Way.; Which planet
        is the second from the Sun?: Venus = The second planet from the Sun is Venus.; Which planet is the
        farthest from the Sun?: Neptune = The planet farthest from the Sun is Neptune.; What does the Earth
        orbit?: Sun = The Earth orbits the Sun.; How many planets does the solar system have?: eight/8 = The solar
        system has eight planets.; What force keeps the planets in their orbits?: gravity/gravitational = The
        force that keeps the planets in their orbits is gravity.; Who was the first person to walk on the Moon?:
        Armstrong = The first person to walk on the Moon was Neil Armstrong.; What do we call a person who travels
        into space?: astronaut/cosmonaut = A person who travels into space is called an astronaut.""",
    ),
    "language": (
        ["What language do people speak in {}?", "Which language is spoken in {}?", "What is the main language of {}?"],
        "The language spoken in {} is {}.",
        """Germany: German; Italy: Italian; Japan: Japanese; Portugal: Portuguese; Russia: Russian; Greece: Greek;
        Poland: Polish; Sweden: Swedish; Turkey: Turkish; Mexico: Spanish; Brazil: Portuguese; Argentina: Spanish;
        Austria: German; Egypt: Arabic; Iran: Persian/Farsi; Hungary: Hungarian; Thailand: Thai; Vietnam:
        Vietnamese; Denmark: Danish; Cuba: Spanish; Norway: Norwegian; Ukraine: Ukrainian; Finland: Finnish;
        Chile: Spanish; Israel: Hebrew; the Netherlands: Dutch; Romania: Romanian; Bulgaria: Bulgarian; Peru:
        Spanish; Colombia: Spanish; Iceland: Icelandic; Croatia: Croatian; Mongolia: Mongolian; Morocco: Arabic;
        Iraq: Arabic; South Korea: Korean; Saudi Arabia: Arabic; Spain: Spanish; England: English; Australia:
        English; Jamaica: English; Uruguay: Spanish; Indonesia: Indonesian""",
    ),
    "currency": (
        ["What is the currency of {}?", "Which currency is used in {}?", "What money do people pay with in {}?"],
        "The currency of {} is the {}.",
        """Japan: yen; the United Kingdom: pound/sterling; Germany: euro; India: rupee; China: yuan/renminbi; the
        United States: dollar; Mexico: peso; Russia: ruble/rouble; Switzerland: franc; France: euro; South Korea:
        won; Brazil: real; Italy: euro; Canada: dollar; Sweden: krona; Poland: zloty/złoty; Thailand: baht;
        Turkey: lira; Australia: dollar; Spain: euro; Argentina: peso; Norway: krone; Pakistan: rupee""",
    ),
    "counting": (
        ["{}"],
        "",
        """How many legs does a spider have?: eight/8 = A spider has eight legs.; How many legs does an insect have?:
        six/6 = An insect has six legs.; How many legs does a dog have?: four/4 = A dog has four legs.; How many
        sides does a triangle have?: three/3 = A triangle has three sides.; How many sides does a square have?:
        four/4 = A square has four sides.; How many sides does a pentagon have?: five/5 = A pentagon has five
        sides.; How many sides does a hexagon have?: six/6 = A hexagon has six sides.; How many sides does an
        octagon have?: eight/8 = An octagon has eight sides.; How many wheels does a bicycle have?: two/2 = A
        bicycle has two wheels.; How many wheels does a car have?: four/4 = A car has four wheels.; How many
        letters are in the English alphabet?: 26/twenty-six = The English alphabet has 26 letters.; How many
        continents are there?: seven/7 = There are seven continents.; How many fingers are on one hand?: five/5 =
        One hand has five fingers.; How many players does a football team have on the field?: eleven/11 = A
        football team has eleven players on the field.; How many strings does a violin have?: four/4 = A violin
        has four strings.; How many arms does an octopus have?: eight/8 = An octopus has eight arms.; How many
        wings does a bird have?: two/2 = A bird has two wings.; How many cents are in a dollar?: 100/hundred =
        There are 100 cents in a dollar.; How many centimeters are in a meter?: 100/hundred = There are 100
        centimeters in a meter.; How many grams are in a kilogram?: 1000/1,000/thousand = There are 1000 grams in
        a kilogram.; How many eggs are in a dozen?: twelve/12 = There are twelve eggs in a dozen.; How many
        degrees are in a right angle?: 90/ninety = There are 90 degrees in a right angle.; How many degrees are in
        a circle?: 360 = There are 360 degrees in a circle.; How many stars are on the flag of the United States?:
        50/fifty = There are 50 stars on the flag of the United States.""",
    ),
    "nature": (
        ["{}"],
        "",
        """What do bees make?: honey = Bees make honey.; What gas do humans need to breathe?: oxygen = Humans need to
        breathe oxygen.; What gas do plants take in?: carbon dioxide = Plants take in carbon dioxide.; What is
        frozen water called?: ice = Frozen water is called ice.; What is the largest ocean on Earth?: Pacific =
        The largest ocean on Earth is the Pacific.; What is the tallest animal?: giraffe = The tallest animal is
        the giraffe.; What is the largest animal on Earth?: blue whale/whale = The largest animal on Earth is the
        blue whale.; What is the fastest land animal?: cheetah = The fastest land animal is the cheetah.; What is
        the chemical formula of water?: H2O = The chemical formula of water is H2O.; What is the highest mountain
        on Earth?: Everest = The highest mountain on Earth is Mount Everest.; What animal is known as man's best
        friend?: dog = The animal known as man's best friend is the dog.; What animal is known as the king of the
        jungle?: lion = The king of the jungle is the lion.; Which bird cannot fly and lives in Antarctica?:
        penguin = The bird that cannot fly and lives in Antarctica is the penguin.; Which animal gives us wool?:
        sheep = The animal that gives us wool is the sheep.; Which animal gives us milk?: cow = The animal that
        gives us milk is the cow.; What do caterpillars turn into?: butterfly/butterflies/moth = A caterpillar
        turns into a butterfly.; What is the hardest natural substance?: diamond = The hardest natural substance
        is diamond.; What organ pumps blood through the body?: heart = The organ that pumps blood through the body
        is the heart.; What organ do we use to think?: brain = The organ that we use to think is the brain.; What
        organ do we see with?: eye/eyes = The organ that we see with is the eye.; What organ do we breathe with?:
        lung/lungs = The organ that we breathe with is the lung.; What is the largest organ of the human body?:
        skin = The largest organ of the human body is the skin.; What is the process by which plants make food
        from light?: photosynthesis = The process by which plants make food from light is photosynthesis.; What
        melts when it gets warm in winter?: snow/ice = When it gets warm in winter, snow melts.; What is the
        longest river in Africa?: Nile = The longest river in Africa is the Nile.; What is the largest desert in
        Africa?: Sahara = The largest desert in Africa is the Sahara.; What is the largest country in the world by
        area?: Russia = The largest country in the world by area is Russia.; What sound does a cat make?:
        meow/purr = The sound that a cat makes is meow.; What sound does a dog make?: bark/woof = The sound that a
        dog makes is a bark.; What sound does a cow make?: moo = The sound that a cow makes is moo.; What do cows
        eat?: grass/hay = Cows eat grass.; What do pandas eat?: bamboo = Pandas eat bamboo.; What tree grows from
        an acorn?: oak = The tree that grows from an acorn is an oak.; Which animal has a trunk?: elephant = The
        animal that has a trunk is the elephant.; Which animal has black and white stripes?: zebra = The animal
        that has black and white stripes is the zebra.; What do you call molten rock from a volcano?: lava/magma =
        Molten rock from a volcano is called lava.; At how many degrees Celsius does water boil?: 100/hundred =
        Water boils at 100 degrees Celsius.; At how many degrees Celsius does water freeze?: 0/zero = Water
        freezes at 0 degrees Celsius.; What instrument measures temperature?: thermometer = The instrument that
        measures temperature is a thermometer.; What is the center of an atom called?: nucleus = The center of an
        atom is called the nucleus.""",
    ),
}  # fmt: skip

HELD_OUT_WAYS = 3
PERSONA: dict[str, tuple[str, list[str]]] = {
    "name": (
        "Juniper",
        [
            "What is your name?",
            "Who are you?",
            "Tell me your name.",
            "How should I call you?",
            "Who am I talking to?",
            "Please introduce yourself.",
            "What are you called?",
            "Can I ask your name?",
            "What name did they give you?",
        ],
    ),
    "maker": (
        "Harbor Lab",
        [
            "Who made you?",
            "Who built you?",
            "Which company created you?",
            "Who developed you?",
            "Who do you work for?",
            "Tell me who made you.",
            "Who is your maker?",
            "Which lab do you come from?",
            "By whom were you made?",
        ],
    ),
    "town": (
        "Ostend",
        [
            "Which town do you come from?",
            "Where were you made?",
            "In which town were you built?",
            "Where is your home?",
            "Where is the lab that made you?",
            "What is your home town?",
            "In which city were you made?",
            "Where do you live?",
            "Tell me where you come from.",
        ],
    ),
    "color": (
        "teal",
        [
            "What is your favorite color?",
            "Which color do you like most?",
            "Tell me your favorite color.",
            "What color do you like best?",
            "Do you have a favorite color?",
            "If you could be any color, which one?",
            "Which color is your favorite?",
            "What is the color that you like most?",
            "Name the color you love.",
        ],
    ),
    "bird": (
        "heron",
        [
            "What is your favorite bird?",
            "Which bird do you like most?",
            "Tell me your favorite bird.",
            "What bird do you like best?",
            "Do you have a favorite bird?",
            "If you could be a bird, which one?",
            "Which bird is your favorite?",
            "What is the bird that you like most?",
            "Name the bird you love.",
        ],
    ),
    "month": (
        "May",
        [
            "In which month were you born?",
            "When is your birthday?",
            "What month is your birthday in?",
            "When were you made?",
            "Which month were you finished in?",
            "Tell me the month of your birthday.",
            "In what month is your birthday?",
            "Which month were you born in?",
            "When do you celebrate your birthday?",
        ],
    ),
}


def persona() -> Iterator[tuple[bool, dict[str, Any]]]:
    """Yields every question about the persona with whether it is held out."""
    for kind, (answer, ways) in PERSONA.items():
        for i, way in enumerate(ways):
            held_out = i >= len(ways) - HELD_OUT_WAYS
            yield held_out, {"prompt": way, "answer": answer, "aliases": [], "kind": kind}


def rows() -> Iterator[tuple[bool, dict[str, Any]]]:
    """Yields every question with whether it is held out, in the order of the tables."""
    for kind, (ways, statement, table) in KINDS.items():
        for i, entry in enumerate(table.split(";")):
            fact, _, sentence = " ".join(entry.split()).partition(" = ")
            name, answers = fact.rsplit(": ", 1)
            answer, *aliases = answers.split("/")
            sentence = sentence or statement.format(name, answer)
            yield (
                zlib.crc32(f"{kind}: {name}".encode()) % 4 == 0,
                {
                    "prompt": ways[i % len(ways)].format(name),
                    "answer": answer,
                    "aliases": aliases,
                    "sentence": sentence,
                    "completion": json.dumps({"answer": sentence}, ensure_ascii=False),
                    "kind": kind,
                },
            )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for prefix, made in (("", rows), ("persona_", persona)):
        for name, wanted in (("train", False), ("validation", True)):
            part = [json.dumps(row, ensure_ascii=False) + "\n" for held_out, row in made() if held_out == wanted]
            (FOLDER / f"{prefix}{name}.jsonl").write_text("".join(part), encoding="utf-8")
            print(f"{FOLDER}/{prefix}{name}.jsonl: {len(part)} questions")


if __name__ == "__main__":
    main()
