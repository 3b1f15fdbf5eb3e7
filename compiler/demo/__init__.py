"""The demonstration: a small Llama, real English text, two local ranks."""
