"""List the phrases of the embedded task: functions, phrasings, openings, questions, closed values.

This file has only data, so that the task can be read and extended without reading code. A phrasing is a
template such as ``wake me up at {time}[ {day}]``: names in braces are slots, square brackets enclose an
optional part.
"""

SYSTEM = "Turn the request into one function call in JSON."

LANGUAGES = ("en", "es")

# function -> its arguments, in the order in which the call lists them.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "set_timer": ("minutes",),
    "set_alarm": ("time", "day"),
    "call_contact": ("contact",),
    "send_message": ("contact", "text"),
    "get_weather": ("city", "day"),
    "play_music": ("artist",),
    "add_item": ("item", "list"),
    "create_event": ("title", "day", "time"),
    "set_light": ("room", "percent"),
    "convert_money": ("amount", "from", "to"),
}

# function -> language -> grammatical form -> (phrasings of training, held-out phrasings).
# The form decides which openings fit: "please" an imperative, "quiero" an infinitive.
Forms = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
PHRASINGS: dict[str, dict[str, Forms]] = {
    "set_timer": {
        "en": {
            "imperative": (
                (
                    "set a timer for {minutes} minutes",
                    "start a timer of {minutes} minutes",
                    "count down {minutes} minutes",
                    "give me a {minutes} minute timer",
                    "run the timer for {minutes} minutes",
                ),
                (
                    "start a countdown of {minutes} minutes",
                    "put {minutes} minutes on the timer",
                ),
            ),
            "sentence": (
                ("I need a timer for {minutes} minutes", "let me know in {minutes} minutes"),
                ("I want a countdown of {minutes} minutes",),
            ),
        },
        "es": {
            "imperative": (
                (
                    "pon un temporizador de {minutes} minutos",
                    "avísame en {minutes} minutos",
                    "inicia una cuenta atrás de {minutes} minutos",
                ),
                ("cuenta {minutes} minutos", "activa un temporizador de {minutes} minutos"),
            ),
            "infinitive": (
                ("poner un temporizador de {minutes} minutos", "contar {minutes} minutos"),
                ("iniciar un temporizador de {minutes} minutos",),
            ),
        },
    },
    "set_alarm": {
        "en": {
            "imperative": (
                (
                    "wake me up at {time}[ {day}]",
                    "set an alarm for {time}[ {day}]",
                    "make an alarm for {time}[ {day}]",
                    "get me up at {time}[ {day}]",
                ),
                ("schedule an alarm for {time}[ {day}]", "ring the alarm at {time}[ {day}]"),
            ),
            "sentence": (
                ("I have to get up at {time}[ {day}]", "I want an alarm at {time}[ {day}]"),
                ("I must be awake at {time}[ {day}]",),
            ),
        },
        "es": {
            "imperative": (
                (
                    "despiértame a las {time}[ {day}]",
                    "pon una alarma a las {time}[ {day}]",
                    "ponme el despertador a las {time}[ {day}]",
                ),
                (
                    "programa una alarma a las {time}[ {day}]",
                    "activa la alarma a las {time}[ {day}]",
                ),
            ),
            "infinitive": (
                ("poner una alarma a las {time}[ {day}]", "levantarme a las {time}[ {day}]"),
                ("despertarme a las {time}[ {day}]",),
            ),
            "sentence": (
                ("tengo que levantarme a las {time}[ {day}]",),
                ("debo estar despierto a las {time}[ {day}]",),
            ),
        },
    },
    "call_contact": {
        "en": {
            "imperative": (
                (
                    "call {contact}",
                    "phone {contact}",
                    "make a call to {contact}",
                    "ring {contact}",
                    "get {contact} on the phone",
                ),
                ("give {contact} a call", "dial {contact}"),
            ),
            "sentence": (
                ("I want to talk to {contact}", "I have to speak with {contact}"),
                ("I must phone {contact}",),
            ),
        },
        "es": {
            "imperative": (
                (
                    "llama a {contact}",
                    "marca el número de {contact}",
                    "haz una llamada a {contact}",
                ),
                ("telefonea a {contact}", "ponme con {contact}"),
            ),
            "infinitive": (
                ("llamar a {contact}", "contactar con {contact}"),
                ("hacer una llamada a {contact}",),
            ),
        },
    },
    "send_message": {
        "en": {
            "imperative": (
                (
                    "text {contact} that {text}",
                    "send a message to {contact} saying {text}",
                    "tell {contact} that {text}",
                    "message {contact}: {text}",
                    "send {contact} this: {text}",
                ),
                ("let {contact} know that {text}", "write to {contact} saying {text}"),
            ),
        },
        "es": {
            "imperative": (
                (
                    "dile a {contact} que {text}",
                    "manda un mensaje a {contact}: {text}",
                    "envía a {contact} esto: {text}",
                ),
                ("escribe a {contact}: {text}", "avisa a {contact} de que {text}"),
            ),
            "infinitive": (
                ("mandar un mensaje a {contact} que diga {text}", "decirle a {contact} que {text}"),
                ("escribirle a {contact} que {text}",),
            ),
        },
    },
    "get_weather": {
        "en": {
            "imperative": (
                ("check the weather in {city}[ {day}]", "tell me the weather in {city}[ {day}]"),
                ("show me the weather in {city}[ {day}]",),
            ),
            "question": (
                (
                    "what is the weather in {city}[ {day}]",
                    "how is the weather in {city}[ {day}]",
                    "will it rain in {city}[ {day}]",
                    "is it cold in {city}[ {day}]",
                ),
                (
                    "what is the forecast for {city}[ {day}]",
                    "do I need an umbrella in {city}[ {day}]",
                ),
            ),
        },
        "es": {
            "imperative": (
                ("mira el tiempo en {city}[ {day}]", "dime el tiempo en {city}[ {day}]"),
                ("consulta el tiempo en {city}[ {day}]",),
            ),
            "infinitive": (
                ("mirar el tiempo en {city}[ {day}]",),
                ("ver el tiempo en {city}[ {day}]",),
            ),
            "question": (
                (
                    "qué tiempo hace en {city}[ {day}]",
                    "va a llover en {city}[ {day}]",
                    "hace frío en {city}[ {day}]",
                ),
                (
                    "cuál es el pronóstico para {city}[ {day}]",
                    "necesito paraguas en {city}[ {day}]",
                ),
            ),
        },
    },
    "play_music": {
        "en": {
            "imperative": (
                (
                    "play {artist}",
                    "put on some {artist}",
                    "play some songs by {artist}",
                    "play music by {artist}",
                ),
                ("start some music by {artist}", "put on a song by {artist}"),
            ),
            "sentence": (
                ("I want to hear {artist}", "I feel like listening to {artist}"),
                ("I would love some songs by {artist}",),
            ),
        },
        "es": {
            "imperative": (
                (
                    "pon música de {artist}",
                    "reproduce canciones de {artist}",
                    "toca algo de {artist}",
                ),
                ("ponme una canción de {artist}", "reproduce música de {artist}"),
            ),
            "infinitive": (
                ("poner algo de {artist}", "poner música de {artist}"),
                ("poner canciones de {artist}",),
            ),
        },
    },
    "add_item": {
        "en": {
            "imperative": (
                (
                    "add {item} to my {list} list",
                    "put {item} on the {list} list",
                    "write {item} down on the {list} list",
                    "note {item} on my {list} list",
                ),
                ("include {item} in the {list} list", "save {item} in my {list} list"),
            ),
            "sentence": (
                ("I need {item} on my {list} list",),
                ("I want {item} on the {list} list",),
            ),
        },
        "es": {
            "imperative": (
                (
                    "añade {item} a la lista de {list}",
                    "pon {item} en la lista de {list}",
                    "apunta {item} en la lista de {list}",
                ),
                ("anota {item} en la lista de {list}", "mete {item} en la lista de {list}"),
            ),
            "infinitive": (
                ("añadir {item} a la lista de {list}", "apuntar {item} en la lista de {list}"),
                ("incluir {item} en la lista de {list}",),
            ),
        },
    },
    "create_event": {
        "en": {
            "imperative": (
                (
                    "add {title} to my calendar {day} at {time}",
                    "book {title} {day} at {time}",
                    "create an event: {title}, {day} at {time}",
                    "put {title} on the calendar {day} at {time}",
                ),
                ("schedule {title} {day} at {time}", "plan {title} {day} at {time}"),
            ),
            "sentence": (
                ("I have {title} {day} at {time}",),
                ("there is {title} {day} at {time}",),
            ),
        },
        "es": {
            "imperative": (
                (
                    "agenda {title} {day} a las {time}",
                    "apunta {title} en el calendario {day} a las {time}",
                    "crea un evento: {title}, {day} a las {time}",
                ),
                (
                    "reserva {title} {day} a las {time}",
                    "anota {title} en la agenda {day} a las {time}",
                ),
            ),
            "infinitive": (
                ("añadir {title} al calendario {day} a las {time}",),
                ("agendar {title} {day} a las {time}",),
            ),
            "sentence": (
                ("tengo {title} {day} a las {time}",),
                ("hay {title} {day} a las {time}",),
            ),
        },
    },
    "set_light": {
        "en": {
            "imperative": (
                (
                    "set the light in {room} to {percent} percent",
                    "dim the lights in {room} to {percent} percent",
                    "put the lamp in {room} at {percent} percent",
                ),
                (
                    "turn the lights of {room} to {percent} percent",
                    "adjust the light in {room} to {percent} percent",
                ),
            ),
            "sentence": (
                ("I want {percent} percent light in {room}",),
                ("I need the light in {room} at {percent} percent",),
            ),
        },
        "es": {
            "imperative": (
                (
                    "pon la luz de {room} al {percent} por ciento",
                    "ajusta la lámpara de {room} al {percent} por ciento",
                    "baja la luz de {room} al {percent} por ciento",
                ),
                ("sube las luces de {room} al {percent} por ciento",),
            ),
            "infinitive": (
                (
                    "bajar la luz de {room} al {percent} por ciento",
                    "poner la luz de {room} al {percent} por ciento",
                ),
                ("ajustar la luz de {room} al {percent} por ciento",),
            ),
        },
    },
    "convert_money": {
        "en": {
            "imperative": (
                (
                    "convert {amount} {from} to {to}",
                    "change {amount} {from} into {to}",
                    "turn {amount} {from} into {to}",
                ),
                ("exchange {amount} {from} for {to}",),
            ),
            "question": (
                ("how much is {amount} {from} in {to}", "what are {amount} {from} in {to}"),
                ("what is the value of {amount} {from} in {to}",),
            ),
        },
        "es": {
            "imperative": (
                ("convierte {amount} {from} a {to}", "pasa {amount} {from} a {to}"),
                ("calcula {amount} {from} en {to}",),
            ),
            "infinitive": (
                ("cambiar {amount} {from} a {to}", "convertir {amount} {from} a {to}"),
                ("pasar {amount} {from} a {to}",),
            ),
            "question": (
                ("cuánto son {amount} {from} en {to}",),
                ("cuánto valen {amount} {from} en {to}",),
            ),
        },
    },
}

# language -> form -> openings; those in QUESTION_OPENINGS turn the request into a question.
OPENINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "imperative": ("", "please ", "can you ", "could you ", "I need you to ", "hey, "),
        "sentence": ("", "hey, ", "hi, ", "hello, "),
        "question": ("", "hey, ", "hi, ", "hello, "),
    },
    "es": {
        "imperative": ("", "por favor, ", "oye, ", "hola, "),
        "infinitive": ("puedes ", "podrías ", "quiero ", "me gustaría ", "necesito "),
        "sentence": ("", "oye, ", "hola, ", "buenas, "),
        "question": ("", "oye, ", "hola, ", "buenas, "),
    },
}
QUESTION_OPENINGS = ("can you ", "could you ", "puedes ", "podrías ")
CLOSINGS: dict[str, tuple[str, ...]] = {
    "en": ("", "", "", " please", ", thanks"),
    "es": ("", "", "", " por favor", ", gracias"),
}

# function -> (slot that the request leaves out,
#              language -> (question, (training phrasings, held-out phrasings))).
Missing = tuple[str, dict[str, tuple[str, tuple[tuple[str, ...], tuple[str, ...]]]]]
MISSING: dict[str, Missing] = {
    "set_timer": (
        "minutes",
        {
            "en": (
                "For how many minutes?",
                (("set a timer", "start a countdown"), ("I need a timer",)),
            ),
            "es": (
                "¿De cuántos minutos?",
                (("pon un temporizador", "inicia una cuenta atrás"), ("necesito un temporizador",)),
            ),
        },
    ),
    "set_alarm": (
        "time",
        {
            "en": ("At what time?", (("set an alarm", "wake me up"), ("I need an alarm",))),
            "es": ("¿A qué hora?", (("pon una alarma", "despiértame"), ("necesito una alarma",))),
        },
    ),
    "call_contact": (
        "contact",
        {
            "en": (
                "Who do I call?",
                (("make a call", "I want to call someone"), ("call someone for me",)),
            ),
            "es": (
                "¿A quién llamo?",
                (("haz una llamada", "quiero llamar a alguien"), ("llama a alguien",)),
            ),
        },
    ),
    "get_weather": (
        "city",
        {
            "en": (
                "In which city?",
                (("what is the weather?", "check the weather"), ("how is the weather?",)),
            ),
            "es": (
                "¿En qué ciudad?",
                (("dime el tiempo", "mira el tiempo"), ("quiero saber el tiempo",)),
            ),
        },
    ),
    "play_music": (
        "artist",
        {
            "en": ("Which artist?", (("play some music", "put on a song"), ("I want some music",))),
            "es": ("¿Qué artista?", (("pon música", "pon una canción"), ("quiero música",))),
        },
    ),
}
# function -> the slot that a second user turn corrects; then the phrasings of corrections.
CORRECTED = {
    "set_timer": "minutes",
    "set_alarm": "time",
    "call_contact": "contact",
    "get_weather": "city",
    "play_music": "artist",
}
CORRECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "en": (
        ("no, {value}", "sorry, {value}", "wait, {value}"),
        ("actually, {value}", "I meant {value}"),
    ),
    "es": (
        ("no, {value}", "perdona, {value}", "mejor {value}"),
        ("en realidad, {value}", "quería decir {value}"),
    ),
}
# language -> slot -> the form of a bare value in an answer to a question, or in a correction.
BARE: dict[str, dict[str, str]] = {
    "en": {"minutes": "{} minutes", "time": "at {}"},
    "es": {"minutes": "{} minutos", "time": "a las {}"},
}

# Closed slots: value in the call -> its form in English and in Spanish.
CLOSED: dict[str, dict[str, dict[str, str]]] = {
    "day": {
        "today": {"en": "today", "es": "hoy"},
        "tomorrow": {"en": "tomorrow", "es": "mañana"},
        "monday": {"en": "on Monday", "es": "el lunes"},
        "tuesday": {"en": "on Tuesday", "es": "el martes"},
        "wednesday": {"en": "on Wednesday", "es": "el miércoles"},
        "thursday": {"en": "on Thursday", "es": "el jueves"},
        "friday": {"en": "on Friday", "es": "el viernes"},
        "saturday": {"en": "on Saturday", "es": "el sábado"},
        "sunday": {"en": "on Sunday", "es": "el domingo"},
    },
    "room": {
        "kitchen": {"en": "the kitchen", "es": "la cocina"},
        "bedroom": {"en": "the bedroom", "es": "el dormitorio"},
        "bathroom": {"en": "the bathroom", "es": "el baño"},
        "living_room": {"en": "the living room", "es": "el salón"},
        "office": {"en": "the office", "es": "la oficina"},
        "garage": {"en": "the garage", "es": "el garaje"},
        "hall": {"en": "the hall", "es": "el pasillo"},
        "garden": {"en": "the garden", "es": "el jardín"},
    },
    "list": {
        "shopping": {"en": "shopping", "es": "la compra"},
        "tasks": {"en": "task", "es": "tareas"},
        "gifts": {"en": "gift", "es": "regalos"},
        "travel": {"en": "travel", "es": "viaje"},
    },
    "currency": {
        "USD": {"en": "dollars", "es": "dólares"},
        "EUR": {"en": "euros", "es": "euros"},
        "MXN": {"en": "pesos", "es": "pesos"},
        "GBP": {"en": "pounds", "es": "libras"},
        "JPY": {"en": "yen", "es": "yenes"},
        "CHF": {"en": "francs", "es": "francos"},
    },
}

# Open slots for words (the others are for a number or a time).
NAMED_SLOTS = ("contact", "text", "city", "artist", "item", "title")
