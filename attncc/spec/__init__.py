"""The declarative spec: pydantic models, and their lowering to attention graphs."""
