"""How tokens are made: in this process (`hf`), or behind somebody's HTTP (`remote`)."""
