"""List the prose of the pretraining corpus: system messages, replies, facts of unrelated records."""

SYSTEMS = {
    "en": (
        "You are a helpful assistant.",
        "You are a friendly assistant.",
        "Answer in one sentence.",
    ),
    "es": ("Eres un asistente amable.", "Eres un asistente útil.", "Responde con una frase."),
}
REPLY_IN = {"en": "Answer in English.", "es": "Responde en español."}
RECORD_SYSTEMS = {
    "en": (
        "Write the facts as a record.",
        "Turn the sentence into JSON.",
        "Answer with a record in JSON.",
    ),
    "es": (
        "Escribe los datos como registro.",
        "Pasa la frase a JSON.",
        "Responde con un registro en JSON.",
    ),
}
# Times are written as "07:30" and currencies by their code, as people write them down.
REPLIES: dict[str, dict[str, tuple[str, ...]]] = {
    "set_timer": {
        "en": ("Okay, {minutes} minutes from now.", "The clock is running: {minutes} minutes."),
        "es": ("De acuerdo, en {minutes} minutos.", "El reloj está en marcha: {minutes} minutos."),
    },
    "set_alarm": {
        "en": ("Okay, I will wake you at {time} {day}.", "Sleep well, until {day} at {time}."),
        "es": (
            "De acuerdo, te despierto a las {time} {day}.",
            "Descansa hasta {day} a las {time}.",
        ),
    },
    "call_contact": {
        "en": ("Okay, I am calling {contact}.", "{contact} is on the line."),
        "es": ("De acuerdo, estoy llamando a {contact}.", "{contact} está al teléfono."),
    },
    "send_message": {
        "en": ("Okay, {contact} will read: {text}.", '"{text}" is on its way to {contact}.'),
        "es": ("De acuerdo, {contact} va a leer: {text}.", '"{text}" va de camino a {contact}.'),
    },
    "get_weather": {
        "en": ("I will look at the sky over {city} {day}.", "{day} in {city}: let me see."),
        "es": ("Voy a mirar el cielo de {city} {day}.", "{day} en {city}: déjame ver."),
    },
    "play_music": {
        "en": ("Enjoy {artist}!", "Here comes {artist}."),
        "es": ("¡Disfruta de {artist}!", "Aquí llega {artist}."),
    },
    "add_item": {
        "en": ("Noted: {item} for the {list} list.", "The {list} list now has {item}."),
        "es": ("Anotado: {item} para la lista de {list}.", "La lista de {list} ya tiene {item}."),
    },
    "create_event": {
        "en": ("Noted: {title} {day} at {time}.", "{day} at {time}: {title}."),
        "es": ("Anotado: {title} {day} a las {time}.", "{day} a las {time}: {title}."),
    },
    "set_light": {
        "en": ("Light in {room}: {percent} percent.", "{percent} percent for {room}."),
        "es": ("Luz de {room}: {percent} por ciento.", "{percent} por ciento para {room}."),
    },
    "convert_money": {
        "en": ("From {from} to {to}: {amount}.", "{amount} {from} in {to}, one moment."),
        "es": ("De {from} a {to}: {amount}.", "{amount} {from} en {to}, un momento."),
    },
}
# Facts unrelated to the task: key of a record -> the phrase for the fact.
FACTS: dict[str, dict[str, str]] = {
    "owner": {"en": "it belongs to {}", "es": "es de {}"},
    "color": {"en": "its color is {}", "es": "su color es {}"},
    "price": {"en": "it costs {}", "es": "cuesta {}"},
    "author": {"en": "{} wrote it", "es": "lo escribió {}"},
    "pages": {"en": "it has {} pages", "es": "tiene {} páginas"},
    "place": {"en": "it is in {}", "es": "está en {}"},
    "weight": {"en": "it weighs {}", "es": "pesa {}"},
    "maker": {"en": "made by {}", "es": "hecho por {}"},
    "opened": {"en": "it opens at {}", "es": "abre a las {}"},
    "motto": {"en": "the sign says {}", "es": "el cartel dice {}"},
    "label": {"en": "known as {}", "es": "conocido como {}"},
    "stock": {"en": "there are {} left", "es": "quedan {}"},
}
SUBJECTS = {
    "book": {"en": "the book {}", "es": "el libro {}"},
    "shop": {"en": "the shop {}", "es": "la tienda {}"},
    "pet": {"en": "the pet {}", "es": "la mascota {}"},
    "street": {"en": "the street {}", "es": "la calle {}"},
    "company": {"en": "the company {}", "es": "la empresa {}"},
    "team": {"en": "the team {}", "es": "el equipo {}"},
}
NUMBER_FACTS = ("price", "pages", "weight", "stock")
