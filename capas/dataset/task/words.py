"""List the real words of the embedded task's values, and the frames around them."""

from capas.dataset.task.phrases import LANGUAGES

# Kind of atom -> language -> words. Names of people and places are the same in both languages.
_NAMES = (
    "Ana Luis Marta Carlos Sofia Diego Elena Pablo Lucia Jorge Carmen Paula Miguel Laura Javier Rosa "
    "Alberto Irene Tomas Emma Liam Olivia Noah Grace Ethan Chloe Mason Ruby Logan Hazel Owen Alice Jack "
    "Nora Henry Clara Oscar Julia Victor Mia Hugo Nina Felix Eva Bruno Sara Simon Iris Marco Teresa "
    "Daniel Monica Adrian Ines Ruben Gloria Ivan Silvia Raul Martin Leo Alma Gael Vera Dario Lola Enzo "
    "Greta Samuel Amelia Lucas Zoe Peter Helen Frank Alba Nuria Sergio Pilar Rocio Andrea Manuel Lorena "
    "Ignacio Beatriz Walter Edith Harold Joan Keith Wendy Trevor Sandra Philip Megan"
)
_CITIES = (
    "Lima Bogotá Madrid Quito Sevilla Valencia Montevideo Santiago Caracas Rosario Oslo Paris Berlin "
    "Toronto Boston Denver Chicago Dublin Lisbon Porto Milan Vienna Prague Athens Cairo Nairobi Seoul "
    "Osaka Tokyo Mumbai Sydney Auckland Miami Dallas Seattle Granada Bilbao Toledo Cuzco Monterrey "
    "Puebla Cancún Medellín Cali Arequipa Managua Havana Zurich Geneva Krakow Helsinki Malaga Murcia "
    "Zaragoza Tampico Leeds Bristol Glasgow Cardiff Houston Phoenix Portland Austin"
)
_TEXTS: dict[str, dict[str, str]] = {
    "person": {"en": _NAMES, "es": _NAMES},
    "city": {"en": _CITIES, "es": _CITIES},
    "good": {
        "en": (
            "milk eggs bread rice apples coffee sugar batteries soap tea tomatoes cheese yogurt butter "
            "carrots shampoo honey salt flour onions bananas cereal juice toothpaste napkins garlic "
            "potatoes chicken tuna candles stamps lettuce almonds pasta olives pepper beans grapes "
            "lemons cookies chocolate jam mustard oats spinach mushrooms salmon towels sponges pencils "
            "envelopes"
        ),
        "es": (
            "leche huevos pan arroz manzanas café azúcar pilas jabón té tomates queso yogur mantequilla "
            "zanahorias champú miel sal harina cebollas plátanos cereales zumo servilletas ajo patatas "
            "pollo atún velas sellos lechuga almendras fideos aceitunas pimienta judías uvas limones "
            "galletas chocolate mermelada mostaza avena espinacas setas salmón toallas esponjas lápices "
            "sobres"
        ),
    },
    "quality": {
        "en": (
            "fresh frozen sweet green organic plain small large cheap local dried smoked ripe "
            "spicy light dark salted mixed baby golden white black soft hard creamy toasted "
            "sliced grated canned raw mild crunchy"
        ),
        "es": (
            "natural dulce verde grande suave picante integral normal especial barato fresco seco "
            "salado ligero blanco negro tierno cremoso rallado tostado crudo ahumado casero "
            "entero molido congelado"
        ),
    },
    "occasion": {
        "en": (
            "lunch dinner breakfast coffee drinks brunch tennis golf chess yoga rehearsal "
            "training interview supper picnic bowling hiking cycling swimming karaoke football "
            "basketball badminton cards poker shopping sailing skating"
        ),
        "es": (
            "comida cena desayuno merienda tenis golf ajedrez yoga ensayo entrenamiento "
            "entrevista almuerzo baloncesto fútbol senderismo ciclismo bolos karaoke cartas póker "
            "patinaje compras vela escalada pesca"
        ),
    },
    "subject": {
        "en": (
            "piano guitar cooking dance painting pottery drawing swimming history biology French German "
            "Italian chemistry photography sewing singing theater violin karate"
        ),
        "es": (
            "piano guitarra cocina baile pintura cerámica dibujo natación historia biología francés "
            "alemán italiano química fotografía costura canto teatro violín karate"
        ),
    },
    "thing": {
        "en": (
            "dinner car report cake train door dog jacket charger ticket package key phone laptop bus "
            "map bag box letter printer boat tent drill ladder bike camera wallet umbrella chair table "
            "bottle suitcase helmet radio"
        ),
        "es": (
            "coche informe pastel tren perro cargador paquete teléfono autobús mapa bolso libro "
            "sobre barco taladro billete cuadro reloj vestido casco horno gato regalo equipaje "
            "pedido martillo sombrero abrigo cuaderno espejo ordenador paraguas cuchillo plato "
            "vaso collar anillo jersey pantalón cinturón cepillo peine colchón sillón armario "
            "ventilador"
        ),
    },
    "place": {
        "en": (
            "station gate beach museum airport library market school hotel clinic stadium bakery "
            "park harbor theater gym church bridge castle bank pharmacy stop pool court square "
            "palace tower mall cinema cafe farm lake embassy studio"
        ),
        "es": (
            "parque museo aeropuerto mercado colegio hotel hospital estadio teatro gimnasio "
            "puerto banco castillo puente bar cine centro taller lago bosque palacio restaurante "
            "supermercado consulado estudio instituto juzgado pabellón circo acuario casino club "
            "refugio"
        ),
    },
    "color": {
        "en": (
            "Red Blue Golden Silver Wild Quiet Electric Broken Lonely Velvet Crystal Midnight "
            "Paper Lost Holy Lucky Green Purple Hidden Frozen Burning Distant Gentle Iron Wooden "
            "Royal Sleepy Magic"
        ),
        "es": (
            "Rojos Azules Salvajes Perdidos Locos Negros Dorados Libres Nobles Rebeldes Grises "
            "Rotos Blancos Verdes Valientes Felices Tristes Secretos Eternos Solitarios Veloces "
            "Fieles Errantes Lejanos"
        ),
    },
    "animal": {
        "en": (
            "Wolves Tigers Lanterns Rivers Foxes Pilots Dreamers Shadows Arrows Ravens Kings "
            "Mirrors Sailors Trees Bells Comets Drums Stones Ghosts Dragons Horses Falcons "
            "Pirates Dancers Rebels Swans Owls Bears Hunters Angels"
        ),
        "es": (
            "Lobos Tigres Faroles Ríos Zorros Pilotos Cuervos Reyes Espejos Marinos Gatos "
            "Tambores Cometas Leones Vientos Caminos Toros Halcones Caballos Osos Piratas "
            "Fantasmas Dragones Búhos Cisnes Ángeles Rebeldes Poetas Gigantes"
        ),
    },
}
WORDS = {
    kind: {language: tuple(texts[language].split()) for language in LANGUAGES}
    for kind, texts in _TEXTS.items()
}

Frames = dict[str, tuple[str, ...]]
# Slot -> language -> frames; a name in braces is a kind of atom.
TEXT_FRAMES: Frames = {
    "en": (
        "the {thing} is ready",
        "the {thing} is here",
        "the {thing} is at the {place}",
        "the {thing} is late",
        "I am at the {place}",
        "I have the {thing}",
        "I will bring the {thing}",
        "{person} is at the {place}",
        "{person} has the {thing}",
        "{person} is late",
        "the {place} is closed",
        "we need the {thing}",
    ),
    "es": (
        "el {thing} está aquí",
        "el {thing} llega tarde",
        "el {thing} está en el {place}",
        "el {thing} no funciona",
        "estoy en el {place}",
        "tengo el {thing}",
        "voy a traer el {thing}",
        "{person} está en el {place}",
        "{person} tiene el {thing}",
        "{person} llega tarde",
        "el {place} está cerrado",
        "nos falta el {thing}",
    ),
}
TITLE_FRAMES: Frames = {
    "en": (
        "{occasion} with {person}",
        "{subject} class",
        "{subject} exam",
        "meeting with {person}",
        "visit to {city}",
    ),
    "es": (
        "{occasion} con {person}",
        "clase de {subject}",
        "examen de {subject}",
        "reunión con {person}",
        "visita a {city}",
    ),
}
ITEM_FRAMES: Frames = {
    "en": ("{good}", "{quality} {good}", "{brand} {good}"),
    "es": ("{good}", "{good} {quality}", "{good} {brand}"),
}
ARTIST_FRAMES: Frames = {
    "en": (
        "{person}",
        "{person} {surname}",
        "{surname}",
        "The {color} {animal}",
        "{color} {animal}",
    ),
    "es": (
        "{person}",
        "{person} {surname}",
        "{surname}",
        "Los {animal} {color}",
        "Los {animal} de {city}",
    ),
}
CITY_FRAMES: Frames = {
    "en": ("{city}", "{city}", "Port {city}", "New {city}"),
    "es": ("{city}", "{city}", "Villa {city}", "San {person}"),
}
CONTACT_FRAMES = ("{person}", "{person}", "{person} {surname}")
FRAMES: dict[str, Frames] = {
    "contact": {"en": CONTACT_FRAMES, "es": CONTACT_FRAMES},
    "text": TEXT_FRAMES,
    "city": CITY_FRAMES,
    "artist": ARTIST_FRAMES,
    "item": ITEM_FRAMES,
    "title": TITLE_FRAMES,
}
NUMBER_RANGES = {"minutes": (2, 180), "percent": (5, 100), "amount": (2, 999)}
