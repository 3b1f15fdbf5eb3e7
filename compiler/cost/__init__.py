"""What things cost: a roofline for ops, alpha-beta per collective, calibrated on the machine at hand."""
