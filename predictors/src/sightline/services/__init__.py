"""One file per contract: its routes, its defaults, its bodies. Nothing here imports kserve."""
