"""Jobs on several machines: what starts them, and a check of the network before one waits in vain."""
