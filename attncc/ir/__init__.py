"""The expression language and the attention graph."""
