"""The trained model as a GGUF file for llama.cpp and Ollama; importing it without the extra raises UserError."""

from truetune.errors import UserError

try:
    import gguf  # noqa: F401
except ImportError as error:
    raise UserError("writing a GGUF file needs the extra: pip install 'truetune[gguf]'") from error
