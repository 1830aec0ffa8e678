"""Small networks with one known ailment each, and healthy twins: what a checkup says of them."""
