"A laboratory one can execute."

__version__ = "0.1.0"
