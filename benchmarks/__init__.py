"""What measuring costs, against the bare training step and beside other tools."""
