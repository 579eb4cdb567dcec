"""What methods have in common; the registry of methods does not look here."""
