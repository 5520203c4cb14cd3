"""What attncc gives to other systems."""
