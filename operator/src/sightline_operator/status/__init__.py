"""How an object is doing: conditions, reasons, and the deepest message that explains them. Pure."""
