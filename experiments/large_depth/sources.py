"""Whose a claim is, and what claims of several topics say alike."""

PAPER = "Marion, Fermanian, Biau, Vert, arXiv:2206.06929"
RECALLED = f"{PAPER}, as recalled, not re-read"
DERIVED = "derived for this project (conditioning.theory)"
# Statements that only a mistake in the program could make fail begin with this.
CHECK = "Instrument check: "
SIGN = "a sign, not a size"
