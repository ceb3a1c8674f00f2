"""Jobs on several machines: the commands that start them, and a check of the network between the machines."""
