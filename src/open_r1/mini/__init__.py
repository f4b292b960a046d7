"""The miniature: a small drawn and sounding world in which the whole experiment runs on a CPU."""
